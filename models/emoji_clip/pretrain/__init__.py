"""Pretraining as a command: see __main__.py."""
