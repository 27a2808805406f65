"""A Python prompt on the probe: instructions as functions, VMCS and VMCB as objects.

`docs/shell.md` is the guide; `namespace` has the names that the prompt knows.
"""
