"""Tables and figures, made from cached logits."""
