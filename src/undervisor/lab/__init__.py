"""Real Linux stacks from a distribution's packages: L1 with its own KVM, L2 under it, and L3.

    from undervisor.lab.stack import Lab

    with Lab(depth=2) as lab:
        print(lab.level(2).run("uname -r").stdout)

Images are built here, without root; L1 runs on the host's KVM where that can nest, on QEMU's TCG
with emulated SVM where it cannot.  `keeper` is the process that everything of a lab dies with.
"""
