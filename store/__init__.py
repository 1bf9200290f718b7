"""Everything that touches a disk: atomic files, weights, run folders, the logits cache, provenance."""
