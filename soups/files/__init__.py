"""Files of weights: readers of every checkpoint, writers, digests. Whole or absent, whenever the process dies."""
