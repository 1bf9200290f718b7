"""Icons of general sets and their names: what the embedded model is pretrained on."""
