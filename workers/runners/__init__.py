"""Run attempts, as local processes or through Ray actors, and monitor them."""
