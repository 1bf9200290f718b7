"""Forward passes to cached logits, logits to metrics, differences to intervals. Import its parts, never `eval`."""
