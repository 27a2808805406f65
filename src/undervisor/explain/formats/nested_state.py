"""`KVM_GET_NESTED_STATE` blobs: what a live migration moves of a nested guest.

The header has 128 bytes: flags, format (0 VMX, 1 SVM), the size of the whole, and the vendor's
part.  Behind it: vmcs12 and the shadow vmcs12, 4 KiB each, or vmcb12, 4 KiB; or nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from undervisor.arch.bits import Bits, Register
from undervisor.arch.svm.vmcb import Vmcb
from undervisor.arch.vmx.checks.inputs import EntryInput
from undervisor.explain import vmcs12
from undervisor.explain.dump import SVM, VMX, Dump

HEADER, PAGE = 128, 0x1000
FORMATS = {0: VMX, 1: SVM}
NO_ADDRESS = (1 << 64) - 1


class StateFlags(Register):
    """The flags of the header."""

    WIDTH = 16
    guest_mode = Bits(0, about="GUEST_MODE: the vCPU runs L2")
    run_pending = Bits(1, about="RUN_PENDING: an entry has begun and not reached L2")
    evmcs = Bits(2, about="EVMCS: an enlightened VMCS of Hyper-V")
    mtf_pending = Bits(3, about="MTF_PENDING: a monitor-trap exit is due")
    gif_set = Bits(8, about="GIF_SET: the global interrupt flag (SVM)")
    gpat_valid = Bits(9, about="GPAT_VALID: the header holds L2's own PAT (SVM)")


class SmmFlags(Register):
    """The flags about SMM in the VMX header."""

    WIDTH = 16
    guest_mode = Bits(0, about="an SMI interrupted L2")
    vmxon = Bits(1, about="an SMI interrupted VMX operation")


@dataclass(frozen=True, slots=True)
class NestedState:
    """A decoded blob; `main` is vmcs12 or vmcb12 (raw), empty where the blob has none."""

    vendor: str
    flags: StateFlags
    size: int
    header: dict[str, int]
    main: bytes = b""
    shadow: bytes = b""
    problems: list[str] = field(default_factory=list)

    def state(self) -> dict[int, int]:
        """The fields of vmcs12 or vmcb12."""
        if not self.main:
            return {}
        if self.vendor == SVM:
            vmcb = Vmcb(self.main)
            return {int(f): vmcb[f] for f in vmcb}
        return vmcs12.decode(self.main)


def looks_like(raw: bytes) -> bool:
    """Whether the bytes can be a nested-state blob."""
    if len(raw) < HEADER:
        return False
    flags, kind, size = _word(raw, 0, 2), _word(raw, 2, 2), _word(raw, 4, 4)
    if kind not in FORMATS or flags & ~StateFlags.DECLARED:
        return False
    return size in (HEADER, HEADER + PAGE, HEADER + 2 * PAGE) and not any(raw[64:HEADER])


def decode(raw: bytes) -> NestedState:
    """The blob; its inconsistencies are in `problems`, each a sentence."""
    flags = StateFlags(_word(raw, 0, 2))
    vendor, size = FORMATS[_word(raw, 2, 2)], _word(raw, 4, 4)
    body = raw[HEADER:size]
    main, shadow = _page(body, 0), _page(body, 1)
    state = NestedState(vendor, flags, size, _header(raw, vendor), main, shadow)
    state.problems.extend(_problems(state, len(raw)))
    return state


def _word(raw: bytes, offset: int, size: int) -> int:
    return int.from_bytes(raw[offset : offset + size], "little")


def _page(body: bytes, number: int) -> bytes:
    page = body[number * PAGE : (number + 1) * PAGE]
    return page if len(page) == PAGE else b""


def _header(raw: bytes, vendor: str) -> dict[str, int]:
    if vendor == SVM:
        return {"vmcb_pa": _word(raw, 8, 8), "gpat": _word(raw, 16, 8)}
    return {
        "vmxon_pa": _word(raw, 8, 8),
        "vmcs12_pa": _word(raw, 16, 8),
        "smm_flags": _word(raw, 24, 2),
        "flags": _word(raw, 28, 4),
        "preemption_timer_deadline": _word(raw, 32, 8),
    }


def _problems(state: NestedState, length: int) -> list[str]:
    found = []
    if length < state.size:
        found.append(f"the header says {state.size} bytes and there are {length}: it is cut off")
    if length > state.size:
        found.append(f"{length - state.size} bytes follow the state; they are not part of it")
    if state.flags & StateFlags.reserved():
        found.append(f"flags {int(state.flags):#x}: bits that no kernel defines are set")
    if state.flags.guest_mode and not state.main:
        found.append("GUEST_MODE is set and there is no vmcs12 or vmcb12")
    return found + (_svm_problems(state) if state.vendor == SVM else _vmx_problems(state))


def _vmx_problems(state: NestedState) -> list[str]:
    found, header = [], state.header
    if state.flags & (StateFlags.gif_set | StateFlags.gpat_valid):
        found.append("a flag of SVM is set in a VMX state")
    if header["vmxon_pa"] == NO_ADDRESS:
        if header["vmcs12_pa"] != NO_ADDRESS:
            found.append("there is a current VMCS without VMX operation")
        if state.flags & (StateFlags.guest_mode | StateFlags.run_pending):
            found.append("L2 can't run without VMX operation")
    elif header["vmxon_pa"] & 0xFFF:
        found.append("the VMXON pointer is not aligned to 4 KiB")
    if header["vmcs12_pa"] not in (NO_ADDRESS,) and header["vmcs12_pa"] & 0xFFF:
        found.append("the current-VMCS pointer is not aligned to 4 KiB")
    if header["vmcs12_pa"] == header["vmxon_pa"] != NO_ADDRESS:
        found.append("the current-VMCS pointer equals the VMXON pointer")
    if header["smm_flags"] & SmmFlags.reserved():
        found.append("unknown flags about SMM")
    if header["smm_flags"] & SmmFlags.guest_mode and state.flags.guest_mode:
        found.append("L2 runs and was interrupted by an SMI: both can't be")
    if state.main:
        revision = _word(state.main, 0, 4) & 0x7FFF_FFFF
        if revision != vmcs12.REVISION:
            found.append(
                f"vmcs12 has revision {revision:#x}, not KVM's {vmcs12.REVISION:#x}: "
                "its layout is unknown"
            )
    return found


def _svm_problems(state: NestedState) -> list[str]:
    found = []
    if state.flags & (StateFlags.evmcs | StateFlags.mtf_pending):
        found.append("a flag of VMX is set in an SVM state")
    if state.shadow:
        found.append("an SVM state has one page of data, not two")
    if state.header["vmcb_pa"] & 0xFFF and state.header["vmcb_pa"] != NO_ADDRESS:
        found.append("the VMCB's address is not aligned to 4 KiB")
    return found


def read(raw: bytes) -> list[Dump]:
    """The state that an entry with this blob would check."""
    state = decode(raw)
    dump = Dump(f"KVM nested state ({state.vendor.upper()})", state.vendor)
    known = state.vendor == SVM or not any("revision" in p for p in state.problems)
    dump.state = state.state() if known else {}
    if state.vendor == VMX and dump.state:
        dump.state[EntryInput.CURRENT_VMCS] = state.header["vmcs12_pa"]
        if state.shadow:
            dump.state[EntryInput.LINKED_VMCS] = _word(state.shadow, 0, 4)
    names = [
        bits.about.split(":")[0]
        for n, bits in StateFlags.FIELDS.items()
        if state.flags.FIELDS and state.flags & bits.mask
    ]
    dump.notes.append(f"{state.size} bytes, flags: {' '.join(names) or 'none'}")
    dump.notes += [f"problem: {problem}" for problem in state.problems]
    if not dump.state:
        dump.notes.append("no vmcs12 or vmcb12 inside: the vCPU has not entered an L2 guest")
    return [dump]
