"""VMX operations of a batch. SDM 3C, "VMX Instruction Reference"."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

from undervisor.guest.probe.answers import ALL, CF, ZF, Answer, L2Run, Returned, VmxResult
from undervisor.guest.probe.batch import BatchCore

ERROR = ("r10",)


class VmxOps(BatchCore):
    """The instructions with their outcome, and an L2 run."""

    def _vmx(self, name: str, registers: Mapping[str, int]) -> Answer[VmxResult]:
        return self.call(name, registers, ERROR, VmxResult.of)

    def vmxon(self, region: int) -> Answer[VmxResult]:
        """VMXON with the region at `region`."""
        return self._vmx("vmxon", {"rdi": region})

    def vmxoff(self) -> Answer[VmxResult]:
        """VMXOFF."""
        return self._vmx("vmxoff", {})

    def vmclear(self, vmcs: int) -> Answer[VmxResult]:
        """VMCLEAR of the VMCS at `vmcs`."""
        return self._vmx("vmclear", {"rdi": vmcs})

    def vmptrld(self, vmcs: int) -> Answer[VmxResult]:
        """VMPTRLD of the VMCS at `vmcs`."""
        return self._vmx("vmptrld", {"rdi": vmcs})

    def vmptrst(self) -> Answer[VmxResult]:
        """VMPTRST; `value` is the current-VMCS pointer."""
        return self.call("vmptrst", {}, ("rax", *ERROR), lambda r: VmxResult.of(r, r["rax"]))

    def vmread(self, field: int) -> Answer[VmxResult]:
        """VMREAD; `value` is the field's."""
        out = ("rax", *ERROR)
        return self.call("vmread", {"rdi": field}, out, lambda r: VmxResult.of(r, r["rax"]))

    def vmwrite(self, field: int, value: int) -> Answer[VmxResult]:
        """VMWRITE."""
        return self._vmx("vmwrite", {"rdi": field, "rsi": value})

    def vmwrites(
        self, fields: Mapping[int, int], scratch: int, *, there: bool = False
    ) -> Answer[tuple[int, VmxResult]]:
        """VMWRITE of many fields, up to the first that fails: how many succeeded, the outcome.

        `scratch` is memory for 12 bytes each; `there`: the same fields were written from it before.
        """
        if not there:
            self.write(scratch, rows_of(fields))
        total = len(fields)
        return self.call(
            "vmwrites",
            {"rsi": scratch, "rcx": total},
            ("rcx", *ERROR),
            lambda r: (total - r["rcx"], VmxResult.of(r)),
        )

    def vmreads(
        self, fields: Iterable[int], scratch: int, *, there: bool = False
    ) -> Answer[dict[int, int | None]]:
        """VMREAD of many fields; None for each that fails.

        `scratch` is memory for 13 bytes each; `there`: the same fields were read by it before.
        """
        wanted = list(fields)
        if not there:
            self.write(scratch, struct.pack(f"<{len(wanted)}I", *wanted))
        results = scratch + 4 * len(wanted)
        self.call("vmreads", {"rsi": scratch, "rdi": results, "rcx": len(wanted)}, [])
        size = 9 * len(wanted)
        answer: Answer[dict[int, int | None]] = Answer("VMREADs")

        def decode(data: bytes) -> dict[int, int | None]:
            pairs = struct.iter_unpack("<QB", data)
            return {
                field: None if flags & (CF | ZF) else value
                for field, (value, flags) in zip(wanted, pairs, strict=True)
            }

        read = self.read(results, size)
        request = self.requests[-1]
        assert request.answer is read
        self.requests[-1] = type(request)(request.data, request.most, 0, answer, decode)
        return answer

    def vmlaunch(self) -> Answer[VmxResult]:
        """VMLAUNCH alone, with the host RIP that is in the VMCS."""
        return self._vmx("vmlaunch", {})

    def vmresume(self) -> Answer[VmxResult]:
        """VMRESUME alone, with the host RIP that is in the VMCS."""
        return self._vmx("vmresume", {})

    def vmcall(self) -> Answer[Returned]:
        """VMCALL."""
        return self.call("vmcall", {}, [])

    def vmfunc(self, function: int, ecx: int = 0) -> Answer[Returned]:
        """VMFUNC."""
        return self.call("vmfunc", {"rax": function, "rcx": ecx}, [])

    def invept(self, kind: int, eptp: int = 0) -> Answer[VmxResult]:
        """INVEPT of type `kind`."""
        return self._vmx("invept", {"rdi": kind, "rsi": eptp})

    def invvpid(self, kind: int, vpid: int = 0, address: int = 0) -> Answer[VmxResult]:
        """INVVPID of type `kind`."""
        return self._vmx("invvpid", {"rdi": kind, "rsi": vpid, "rdx": address})

    def vmx_run(
        self, registers: Mapping[str, int] | None = None, resume: bool = False
    ) -> Answer[L2Run]:
        """VMLAUNCH or VMRESUME until a VM exit, with host RSP and RIP set to come back here.

        `registers` are L2's, but for RSP, which the VMCS holds.
        """
        name = "vmresume_run" if resume else "vmlaunch_run"
        return self.call(
            name, registers, ALL, lambda r: L2Run(VmxResult.of(r), r.registers), "L2 run"
        )


def rows_of(fields: Mapping[int, int]) -> bytes:
    """Fields and values as `vmwrites` takes them from memory."""
    return b"".join(struct.pack("<IQ", *row) for row in fields.items())
