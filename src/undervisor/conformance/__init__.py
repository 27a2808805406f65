"""The conformance suite: guest tests in Python that say which rule of the manual an L0 breaks.

A test is a function that is given a lab: the probe as L1 on a target, and an L2 beside it.

    @guest_test("SDM: Instructions That Cause VM Exits Unconditionally")
    def cpuid_in_l2_always_exits(lab: VmxLab) -> None:
        \"\"\"CPUID causes a VM exit unconditionally, with the instruction's length.\"\"\"
        run = lab.run("cpuid")
        run.exits_with(ExitReason.CPUID)
        equal("the exit's instruction length", run.length, 2)

`suite` declares and finds tests, `lab` and `vmx.lab`, `svm.lab` are what they use, `runner` runs
them on a target, `results` writes what came out.
"""
