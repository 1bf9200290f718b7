"""Forward passes to cached logits, logits to metrics, differences to intervals. Import its parts, never `eval`."""

import configs.first_contact  # noqa: F401 - says in one line what is not installed
