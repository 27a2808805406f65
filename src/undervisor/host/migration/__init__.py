"""Whether a guest that nests, or is nested, may move, be saved and be restored."""
