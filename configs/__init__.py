"""Settings: values in yaml groups, names and limits in schema.py, keyed chance in chance.py."""
