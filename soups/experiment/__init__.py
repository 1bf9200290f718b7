"""Soups of this repository's sweeps: the only part of soups that imports the other rooms."""

import configs.first_contact  # noqa: F401 - says in one line what is not installed
