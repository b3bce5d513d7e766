"""Pure decisions over frozen values: what to plan, place, prune, and what it costs."""
