"""Many jobs: what they cost, and how they are sent and watched."""

import configs.first_contact  # noqa: F401 - says in one line what is not installed
