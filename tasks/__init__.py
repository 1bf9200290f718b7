"""What is learned and measured: data, splits, label spaces and the metric of each task."""

import configs.first_contact  # noqa: F401 - says in one line what is not installed
