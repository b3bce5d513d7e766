"""Pure decisions over frozen values: planning, placement, pruning, budgets."""
