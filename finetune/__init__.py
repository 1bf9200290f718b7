"""One ingredient: a row of a sweep to trained weights."""
