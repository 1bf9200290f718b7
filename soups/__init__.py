"""Recipes: from a pool of fine-tuned models to one model or one ensemble."""

import configs.first_contact  # noqa: F401 - says in one line what is not installed
