"""The manuals as data and pure functions: no state, no I/O, nothing of ours imported."""
