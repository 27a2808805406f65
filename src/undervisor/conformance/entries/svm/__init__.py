"""Broken VMRUNs: the states, how each rule is broken, and VMRUN itself."""
