"""What a pool's models, soups, ensembles and mixtures answer, and how sure their differences are."""
