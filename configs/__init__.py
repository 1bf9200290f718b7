"""Settings: values in yaml groups, names and limits in schema.py and the files beside it."""
