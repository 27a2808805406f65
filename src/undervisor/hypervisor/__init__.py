"""L0: the machine that L1 believes in, and everything that happens when L1 or L2 leaves it."""
