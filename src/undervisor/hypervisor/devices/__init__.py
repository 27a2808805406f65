"""The devices of a PC, as far as bare-metal kernels and hypervisors look for them.

Each is a pure model: time comes from a `clock.Clock`, interrupts leave through callables, and
nothing here knows the processor.  `undervisor.hypervisor.platform` wires them to a machine.
"""
