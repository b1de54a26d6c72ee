"""Which weights go: scores, budgets, masks, and how they are stored and applied."""
