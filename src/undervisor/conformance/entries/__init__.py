"""Every rule of VM entry and VMRUN, broken on a running processor.

From a state that the processor really enters, one rule is broken, the entry is performed, and what
happens is held against what the rule declares.

`features` asks the processor what it has, `vmx` and `svm` make its valid and broken states,
`session` performs them and survives what a wrong L0 does, `comparison` puts targets side by side,
and `settled` says what the manual says where they differ.
"""
