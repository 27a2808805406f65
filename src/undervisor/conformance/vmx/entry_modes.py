"""The modes that L2 may begin in, and the change from one to another while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from undervisor.arch.vmx.controls import EntryControls
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.registers import Cr0, Cr4, Efer
from undervisor.conformance.expect import each, equal
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.lab import Changes, VmxLab
from undervisor.conformance.vmx.needs import EPT, UNRESTRICTED, misc

CODE32, DATA16 = 0xC09B, 0x0093
"""Access rights of segments: 32-bit code, and what all are in real mode."""
LONG: Final = int(Efer.lme | Efer.lma)


def _legacy(lab: VmxLab, cr3: int, cr4: int) -> Changes:
    """32-bit protected mode with paging."""
    changes = lab.on_entry(None, ia32e_mode_guest=0)
    changes |= {F.GUEST_CS_ACCESS_RIGHTS: CODE32, F.GUEST_CR3: cr3}
    changes |= {F.GUEST_CR4: lab.fields[F.GUEST_CR4] & ~int(Cr4.pae | Cr4.pcide) | cr4}
    return changes | {F.GUEST_EFER: lab.fields.get(F.GUEST_EFER, 0) & ~LONG}


def _compatibility(lab: VmxLab) -> Changes:
    return {F.GUEST_CS_ACCESS_RIGHTS: CODE32}


def two_levels(lab: VmxLab) -> Changes:
    """32-bit paging with pages of 4 MiB."""
    step = 0x800000
    lab.table(lab.places.pml4, 512, 0x83 | (0x400083 << 32), step | step << 32)
    return _legacy(lab, lab.places.pml4, int(Cr4.pse))


def pae(lab: VmxLab) -> Changes:
    """PAE paging with pages of 2 MiB."""
    places = lab.places
    lab.table(places.pd, 512, 0x83, 1 << 21)
    lab.write_u64(places.pdpt, places.pd | 1, 0, 0, 0)
    return _legacy(lab, places.pdpt, int(Cr4.pae))


def _unpaged(lab: VmxLab) -> Changes:
    """Protected mode without paging, which only an unrestricted guest may have."""
    changes = lab.secondary(lab.ept(12) | _legacy(lab, 0, 0), unrestricted_guest=1)
    return changes | {F.GUEST_CR0: lab.fields[F.GUEST_CR0] & ~int(Cr0.pg)}


def _real(lab: VmxLab) -> Changes:
    changes = _unpaged(lab) | {F.GUEST_RIP: 0, F.GUEST_RSP: 0xFF00}
    changes |= {F.GUEST_CR0: lab.fields[F.GUEST_CR0] & ~int(Cr0.pg | Cr0.pe)}
    for name in ("ES", "CS", "SS", "DS", "FS", "GS"):
        base = lab.places.code if name == "CS" else lab.places.data
        changes |= {
            F[f"GUEST_{name}_SELECTOR"]: base >> 4 & 0xFFFF, F[f"GUEST_{name}_BASE"]: base,
            F[f"GUEST_{name}_LIMIT"]: 0xFFFF,
            F[f"GUEST_{name}_ACCESS_RIGHTS"]: DATA16,
        }  # fmt: skip
    return changes


MODES: Final[dict[str, Callable[[VmxLab], Changes]]] = {
    "compatibility": _compatibility, "two-level paging": two_levels, "PAE paging": pae,
}  # fmt: skip
UNPAGED: Final[dict[str, Callable[[VmxLab], Changes]]] = {
    "protected, no paging": _unpaged, "real": _real,
}  # fmt: skip


def _begins(lab: VmxLab, mode: str, begin: Changes) -> None:
    where, bits = (0x40, 16) if mode == "real" else (lab.places.data + 0x40, 32)
    lab.code(f".code{bits}\nmov $0x12345678, %eax; mov %eax, {where:#x}")
    run = lab.run(None, begin)
    run.ends()
    equal("what L2 wrote", lab.read_u32(lab.places.data + 0x40), 0x12345678)
    fields = (F.GUEST_CR0, F.GUEST_CR3, F.GUEST_CR4, F.GUEST_CS_SELECTOR, F.GUEST_CS_ACCESS_RIGHTS,
              F.ENTRY_CONTROLS)  # fmt: skip
    for field in fields:
        equal(f"{field.name} at the exit", run[field], begin.get(field, lab.fields[field]))


@guest_test("SDM: Loading Guest State", "SDM: Saving Guest State", cases={m: m for m in MODES})
def l2_may_begin_in_any_mode_with_paging(lab: VmxLab, mode: str) -> None:
    """An entry starts a guest in each mode that has paging, and the exit saves that mode."""
    _begins(lab, mode, MODES[mode](lab))


@guest_test("SDM: Unrestricted Guests", "SDM: Loading Guest State", needs=[EPT, UNRESTRICTED],
            cases={m: m for m in UNPAGED})  # fmt: skip
def an_unrestricted_guest_may_begin_without_paging(lab: VmxLab, mode: str) -> None:
    """With "unrestricted guest" an L2 begins in protected mode without paging or in real mode."""
    _begins(lab, mode, UNPAGED[mode](lab))


@guest_test("SDM: Saving Guest State", "SDM: VM-Entry Controls",
            needs=[EPT, UNRESTRICTED, misc("exit_stores_efer_lma")])  # fmt: skip
def an_exit_stores_efer_lma_into_the_entry_controls(lab: VmxLab) -> None:
    """An L2 that enters IA-32e mode by itself has "IA-32e mode guest" 1 behind its next exit.

    So a VMRESUME goes on in that mode; and an L2 that leaves it has it 0.
    """
    lab.fill(lab.places.msr, 0x1000)
    begin = lab.primary(_unpaged(lab), use_msr_bitmaps=1)
    control = int(EntryControls.ia32e_mode_guest)
    lab.code(f"""
        .code32
        mov %cr4, %eax; or ${int(Cr4.pae)}, %eax; mov %eax, %cr4
        mov ${lab.pages():#x}, %eax; mov %eax, %cr3
        mov ${int(Msr.EFER):#x}, %ecx; rdmsr; or ${int(Efer.lme)}, %eax; wrmsr
        mov %cr0, %eax; or ${int(Cr0.pg):#x}, %eax; mov %eax, %cr0
        cpuid
        mov %cr0, %eax; and ${~int(Cr0.pg) & 0xFFFFFFFF:#x}, %eax; mov %eax, %cr0
        cpuid
    """)
    run = lab.run(None, begin)
    equal("IA-32e mode guest at first", begin[F.ENTRY_CONTROLS] & control, 0)
    equal("IA-32e mode guest behind the change", run[F.ENTRY_CONTROLS] & control, control)
    run = lab.skip(run)
    equal("IA-32e mode guest behind the change back", run[F.ENTRY_CONTROLS] & control, 0)
    lab.skip(run).ends()


@guest_test("SDM: Loading Guest Control Registers, Debug Registers, and MSRs",
            needs=[EPT, UNRESTRICTED])  # fmt: skip
def outside_ia32e_mode_efer_has_lma_0_and_lme_0_under_paging(lab: VmxLab) -> None:
    """An entry that does not load EFER clears LMA, and with paging LME; without paging LME stays.

    Into IA-32e mode it sets both.
    """
    lab.fill(lab.places.msr, 0x1000)
    got, wanted = {}, {}
    for name, begin, bits, efer in (
        ("two-level paging", two_levels(lab), 32, 0),
        ("no paging", _unpaged(lab), 32, int(Efer.lme)), ("64-bit", {}, 64, LONG),
    ):  # fmt: skip
        changes = lab.on_exit(lab.on_entry(begin, load_efer=0), save_efer=0)
        changes = lab.primary(changes, use_msr_bitmaps=1)
        lab.code(f".code{bits}\nmov ${int(Msr.EFER):#x}, %ecx; rdmsr")
        run = lab.run(None, changes)
        run.ends()
        got[name], wanted[name] = run.registers["rax"] & LONG, efer
    each("LME and LMA as L2 reads them", got, lambda name: wanted[name])
