"""QEMU's lines about a failure of KVM: what its numbers mean."""

from __future__ import annotations

import re

from undervisor.arch.kvm import SUBERRORS
from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.vmx.exits import ExitReason
from undervisor.explain.dump import SVM, VMX, Dump, Failure, Observation

ENTRY = re.compile(r"KVM: entry failed, hardware error (0x[0-9a-fA-F]{1,16})")
SUBERROR = re.compile(r"KVM internal error\. Suberror: (\d{1,9})")
_DATA = re.compile(r"extra data\[(\d{1,3})\]:\s*(?:0x)?([0-9a-fA-F]{1,16})\b")
UNKNOWN = re.compile(r"KVM: unknown exit, hardware reason\s+(?:0x)?([0-9a-fA-F]{1,16})")
RUN_FAILED = re.compile(r"kvm run failed (.{1,60})")

SIGNS = (ENTRY, SUBERROR, UNKNOWN, RUN_FAILED)
"""What the lines look like that begin a failure."""


def tell_failure(text: str, dump: Dump) -> None:
    """Add what the first line of a failure says."""
    for shape, tell in (
        (ENTRY, _entry_failed),
        (SUBERROR, _suberror),
        (UNKNOWN, _unknown_exit),
        (RUN_FAILED, _run_failed),
    ):
        match = shape.search(text)
        if match:
            tell(dump, match[1], text)
            return


def _entry_failed(dump: Dump, digits: str, text: str) -> None:
    number = int(digits, 16)
    if number in (0xFFFF_FFFF, (1 << 64) - 1):
        dump.vendor, dump.failure = SVM, Failure(code=ExitCode.INVALID)
    elif number >> 31 & 1 and number & 0xFFFF in (33, 34, 41):
        dump.vendor, dump.failure = VMX, Failure(reason=number)
    elif 0 < number <= 28:
        dump.vendor, dump.failure = VMX, Failure(error=number)
    elif number == 0:
        dump.vendor = VMX
        dump.observations.append(
            Observation(
                "qemu.vmfail-invalid",
                "KVM: entry failed, hardware error 0x0",
                "VMLAUNCH or VMRESUME failed and left no VM-instruction error: VMfailInvalid, "
                "there was no current VMCS. On hardware that does not happen to KVM; under "
                "another hypervisor it means that its nested VMX lost the VMCS or broke the entry",
                "look at the hypervisor below (L0): its log, its version, and whether the same "
                "guest runs on bare metal",
                weight=9,
            )
        )
    else:
        dump.observations.append(
            Observation("qemu.hardware-error", f"hardware error {number:#x}", "not a known number")
        )


def _suberror(dump: Dump, digits: str, text: str) -> None:
    number = int(digits)
    known = SUBERRORS.get(number)
    data = {int(n): int(value, 16) for n, value in _DATA.findall(text)}
    dump.observations.append(
        Observation(
            f"kvm.suberror-{number}",
            f"KVM internal error, suberror {number}" + (f": {known.name}" if known else ""),
            known.meaning if known else "a number that no kernel defines",
            known.remedy if known else "",
            tuple(_extra(number, data)),
            weight=7,
        )
    )


def _extra(number: int, data: dict[int, int]) -> list[str]:
    """The extra data of an internal error in words."""
    words = [f"extra data[{n}] = {value:#x}" for n, value in sorted(data.items())]
    if number == 3 and {0, 1} <= data.keys():
        words[0] += f": the event being delivered has vector {data[0] & 0xFF}"
        words[1] += f": exit reason {_reason(data[1])}"
    if number == 4 and 0 in data:
        words[0] += f": exit reason {_reason(data[0])}"
    return words[:8]


def _reason(number: int) -> str:
    try:
        return ExitReason(number & 0xFFFF).name + " (if this is Intel)"
    except ValueError:
        return f"{number:#x}"


def _unknown_exit(dump: Dump, digits: str, text: str) -> None:
    dump.observations.append(
        Observation(
            "qemu.unknown-exit",
            f"KVM: unknown exit, hardware reason {digits}",
            f"the processor left the guest for a reason that KVM does not know: "
            f"{_reason(int(digits, 16))}",
            "if KVM runs nested, its own hypervisor gave an exit that L1 did not ask for",
            weight=7,
        )
    )


def _run_failed(dump: Dump, why: str, text: str) -> None:
    dump.observations.append(
        Observation(
            "qemu.kvm-run-failed",
            f"KVM_RUN failed: {why.strip()}",
            "the kernel refused to run the vCPU",
            '"Bad address" is guest memory without backing; "Invalid argument" or "Operation not '
            'permitted" in a nested L1 is often missing memory or a denied feature: see dmesg',
            weight=6,
        )
    )
