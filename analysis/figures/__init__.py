"""The paper's figures: what each measures, and how it is drawn."""
