"""Backbones and heads, and the small pretrained model that is committed with the code."""

import configs.first_contact  # noqa: F401 - says in one line what is not installed
