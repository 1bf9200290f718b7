"""The paper's tables from measured numbers, and the paper's numbers beside them."""
