"""Speed beside a floor and a peer, one command each."""

import configs.first_contact  # noqa: F401 - says in one line what is not installed
