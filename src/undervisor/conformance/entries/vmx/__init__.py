"""Broken VM entries: the states, how each rule is broken, and the entry itself."""
