"""One queue for a machine, a team or a cluster: who runs next, and where."""
