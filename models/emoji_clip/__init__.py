"""A small open_clip CLIP with pretrained weights: see README.md in this folder."""
