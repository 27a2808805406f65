"""The devices of a PC, as far as bare-metal kernels and hypervisors look for them.

Each is a pure model: time comes from a `clock.Clock`, interrupts leave through callables, and
nothing here knows a processor or an L0.  `hypervisor.platform` and `targets.kvm.board` are boards
that they are put on.
"""
