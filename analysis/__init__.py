"""Tables and figures, made from cached logits."""

import configs.first_contact  # noqa: F401 - says in one line what is not installed
