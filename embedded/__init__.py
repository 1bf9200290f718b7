"""How the embedded benchmark (tasks/emoji) and its model (models/emoji_clip) were made; using them needs none of it."""

import configs.first_contact  # noqa: F401 - says in one line what is not installed
