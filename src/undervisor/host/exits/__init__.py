"""VM exits counted by reason and by whose they were: L1's, L2's for L0, L2's for L1."""
