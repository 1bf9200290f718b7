"""Backbones and heads, and the small pretrained model that is committed with the code."""
