"""From a soup to a folder that a library loads: one module a library writes, reads back and says how to load."""
