"""SVM operations of a batch. APM 2, "SVM Instructions"."""

from __future__ import annotations

from collections.abc import Mapping

from undervisor.guest.probe.answers import ALL, Answer, L2Run, Returned, VmxOutcome, VmxResult
from undervisor.guest.probe.batch import BatchCore


class SvmOps(BatchCore):
    """The instructions alone, and an L2 run with the host's state kept."""

    def vmrun(self, vmcb: int, registers: Mapping[str, int] | None = None) -> Answer[Returned]:
        """VMRUN alone: GIF is clear afterwards, as #VMEXIT leaves it."""
        return self.call("vmrun", {**(registers or {}), "rax": vmcb})

    def vmload(self, vmcb: int) -> Answer[Returned]:
        """VMLOAD."""
        return self.call("vmload", {"rax": vmcb}, [])

    def vmsave(self, vmcb: int) -> Answer[Returned]:
        """VMSAVE."""
        return self.call("vmsave", {"rax": vmcb}, [])

    def vmmcall(self) -> Answer[Returned]:
        """VMMCALL."""
        return self.call("vmmcall", {}, [])

    def stgi(self) -> Answer[Returned]:
        """STGI."""
        return self.call("stgi", {}, [])

    def clgi(self) -> Answer[Returned]:
        """CLGI."""
        return self.call("clgi", {}, [])

    def skinit(self, loader: int) -> Answer[Returned]:
        """SKINIT; where it succeeds, the probe is gone."""
        return self.call("skinit", {"rax": loader}, [])

    def invlpga(self, address: int, asid: int) -> Answer[Returned]:
        """INVLPGA."""
        return self.call("invlpga", {"rax": address, "rcx": asid}, [])

    def svm_run(self, vmcb: int, registers: Mapping[str, int] | None = None) -> Answer[L2Run]:
        """Run L2 until #VMEXIT: VMLOAD, VMRUN, VMSAVE, the host's state kept, GIF set after.

        `registers` are L2's, but for RAX and RSP, which the VMCB holds.
        """
        inward = {**(registers or {}), "rax": vmcb}
        ran = VmxResult(VmxOutcome.SUCCEED)
        out = [name for name in ALL if name != "rax"]
        return self.call("svm_run", inward, out, lambda r: L2Run(ran, r.registers), "L2 run")
