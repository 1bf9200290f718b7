"""The emoji benchmark: object concepts drawn by independent designers, with five distribution shifts."""
