"""One ingredient: a row of a sweep to trained weights."""

import configs.first_contact  # noqa: F401 - says in one line what is not installed
