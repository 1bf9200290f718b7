"""The authors' released pool of 72 models."""
