"""Recipes: from a pool of fine-tuned models to one model or one ensemble."""
