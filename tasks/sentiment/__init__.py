"""The embedded text benchmark (README.md)."""
