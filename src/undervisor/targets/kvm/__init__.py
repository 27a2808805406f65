"""KVM as a target: our own small virtual machine monitor on /dev/kvm.

    target    what a caller starts: an agent here, and a machine in it
    link      this end of the line
    agent     the other end of a byte stream: runs one machine after another, each in a child
    words     what the two say to each other
    session   a child's life: a machine is described, runs, is asked things, ends
    machine   the vCPUs' threads, their exits, how a run ends
    board     what answers at I/O ports; serial output that KVM gathers
    vm, vcpu  a machine and a processor of KVM; `registers` is what they start with
    device    /dev/kvm itself
    archive   the agent as one file, for machines that have Python and nothing of ours

All but `target` and `archive` need only the standard library, so that they run inside any Linux.
"""
