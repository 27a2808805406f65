"""MSRs that entries and exits load and save: by lists, and by fields of their own."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from undervisor.arch.vmx.capabilities import VmxMisc, VmxMsr
from undervisor.arch.vmx.controls import EntryControls
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.registers import Efer
from undervisor.conformance.expect import each, equal, true
from undervisor.conformance.suite import guest_test
from undervisor.conformance.vmx.lab import Changes, VmxLab
from undervisor.conformance.vmx.needs import control
from undervisor.guest.probe.batch import MOST_BYTES

FAILED: Final = ExitReason.ENTRY_FAILURE_MSR_LOADING
KERNEL_GS, LSTAR, TSC = int(Msr.KERNEL_GS_BASE), int(Msr.LSTAR), int(Msr.TSC)
NOT_CANONICAL: Final = 1 << 62
Row = tuple[int, int, int]
"""An entry of a list: index, reserved bits 63:32, value."""


def _write(lab: VmxLab, where: int, rows: Sequence[Row]) -> None:
    lab.write(where, b"".join(struct.pack("<IIQ", *row) for row in rows))


def _entry_list(lab: VmxLab, rows: Sequence[Row]) -> Changes:
    """The rows as VM-entry MSR-load area."""
    _write(lab, lab.places.msr_list, rows)
    return {F.ENTRY_MSR_LOAD_ADDRESS: lab.places.msr_list, F.ENTRY_MSR_LOAD_COUNT: len(rows)}


def _read_msrs(*msrs: int) -> str:
    """L2's code that reads MSRs to R8, R9, ... (bits 31:0)."""
    return "; ".join(
        f"mov ${msr:#x}, %ecx; rdmsr; mov %eax, %r{8 + n}d" for n, msr in enumerate(msrs)
    )


@guest_test("SDM: Loading MSRs", "SDM: Saving MSRs")
def lists_are_loaded_and_stored_in_their_order(lab: VmxLab) -> None:
    """Entry loads its list in order, an exit stores its list and then loads its own."""
    places = lab.places
    lists = _entry_list(lab, [(KERNEL_GS, 0, 0x111), (LSTAR, 0, 0x333), (KERNEL_GS, 0, 0x222)])
    _write(lab, places.msr_list2, [(KERNEL_GS, 0, 0), (TSC, 0, 0), (LSTAR, 0, 0)])
    _write(lab, places.msr_list2 + 0x100, [(KERNEL_GS, 0, 0x888), (KERNEL_GS, 0, 0x999)])
    lists |= {
        F.EXIT_MSR_STORE_ADDRESS: places.msr_list2, F.EXIT_MSR_STORE_COUNT: 3,
        F.EXIT_MSR_LOAD_ADDRESS: places.msr_list2 + 0x100, F.EXIT_MSR_LOAD_COUNT: 2,
    }  # fmt: skip
    source = _read_msrs(KERNEL_GS, LSTAR)
    source += f"; mov ${KERNEL_GS:#x}, %ecx; mov $0x444, %eax; xor %edx, %edx; wrmsr"
    run = lab.run(source, lab.primary(lists, use_msr_bitmaps=1))
    run.ends()
    equal("KERNEL_GS_BASE and LSTAR in L2", (run.registers["r8"], run.registers["r9"]),
          (0x222, 0x333))  # fmt: skip
    stored = struct.unpack("<6Q", lab.read(places.msr_list2, 48))
    equal("what the exit stored of both", (stored[1], stored[5]), (0x444, 0x333))
    true("a TSC was stored", stored[3])
    with lab.batch() as batch:
        after = batch.rdmsr(KERNEL_GS), batch.rdmsr(LSTAR)
    equal("KERNEL_GS_BASE and LSTAR in L1", [answer.value for answer in after], [0x999, 0x333])


BAD: Final[dict[str, Row]] = {
    "FS_BASE": (int(Msr.FS_BASE), 0, 0),
    "GS_BASE": (int(Msr.GS_BASE), 0, 0),
    "an x2APIC MSR": (0x808, 0, 0),
    "reserved bits of the entry": (KERNEL_GS, 1, 0),
    "a value that WRMSR refuses": (KERNEL_GS, 0, NOT_CANONICAL),
    "an MSR that does not exist": (0x1FF0, 0, 0),
    "IA32_FEATURE_CONTROL, which is locked": (int(VmxMsr.IA32_FEATURE_CONTROL), 0, 0),
    "reserved bits of EFER": (int(Msr.EFER), 0, 1 << 40),
    "a microcode update": (0x79, 0, 0),
}


@guest_test("SDM: Loading MSRs", "SDM: VM-Entry Failures During or After Loading Guest State")
def a_bad_entry_fails_the_entry_with_its_number(lab: VmxLab) -> None:
    """An entry that may not be loaded is failure 34; the qualification is its number from 1."""
    got: dict[tuple[str, int], object] = {}
    for name, row in BAD.items():
        for position in (1, 3):
            before = [(LSTAR, 0, 0x5000 + n) for n in range(1, position)]
            run = lab.run("cpuid", _entry_list(lab, [*before, row, (LSTAR, 0, 0x7777)]))
            got[name, position] = run.entered and (run[F.EXIT_REASON], run.qualification)
    each("(what is bad, where): reason and qualification", got,
         lambda case: (1 << 31 | FAILED, case[1]))  # fmt: skip
    lab.run("cpuid").exits_with(ExitReason.CPUID)


@guest_test("SDM: VM-Entry Failures During or After Loading Guest State")
def a_failure_34_saves_no_guest_state_and_loads_the_host(lab: VmxLab) -> None:
    """Failure 34 is like 33: guest-state fields stay, the host's state and list are loaded."""
    _write(lab, lab.places.msr_list2, [(KERNEL_GS, 0, 0x1357)])
    lists = _entry_list(lab, [(int(Msr.FS_BASE), 0, 0)])
    lists |= {F.EXIT_MSR_LOAD_ADDRESS: lab.places.msr_list2, F.EXIT_MSR_LOAD_COUNT: 1}
    lists |= {F.GUEST_RSP: 0x1234, F.HOST_SYSENTER_EIP: 0x456000}
    run = lab.run("cpuid", lists, {"rbx": 77})
    run.entry_fails(FAILED, 1)
    equal("guest RIP and RSP", (run.rip, run[F.GUEST_RSP]), (lab.places.code, 0x1234))
    with lab.batch() as batch:
        after = batch.rdmsr(Msr.SYSENTER_EIP), batch.rdmsr(KERNEL_GS)
        resumed = batch.vmresume()
    equal("SYSENTER_EIP and KERNEL_GS_BASE of L1", [a.value for a in after], [0x456000, 0x1357])
    equal("RBX of L1", run.registers["rbx"], 77)
    equal("the error of VMRESUME", resumed.value.error, 5)


@guest_test("SDM: Miscellaneous Data", "SDM: Loading MSRs")
def a_list_of_the_recommended_maximum_is_loaded(lab: VmxLab) -> None:
    """512 times (IA32_VMX_MISC bits 27:25 + 1) entries are a list that works."""
    misc = VmxMisc(lab.l1.rdmsr(VmxMsr.IA32_VMX_MISC).value)
    most = min(512 * (misc.msr_list_limit + 1), MOST_BYTES // 16)
    where = lab.places.free
    lab.table(where, most, KERNEL_GS, 0, 16)
    lab.table(where + 8, most, 1, 1, 16)
    lists: Changes = {F.ENTRY_MSR_LOAD_ADDRESS: where, F.ENTRY_MSR_LOAD_COUNT: most}
    run = lab.run(_read_msrs(KERNEL_GS), lab.primary(lists, use_msr_bitmaps=1))
    run.ends()
    equal("KERNEL_GS_BASE, which each entry loads anew", run.registers["r8"], most)


@guest_test("SDM: VM-Entry Control Fields", "SDM: VM-Exit Control Fields")
def a_list_address_counts_only_with_a_count(lab: VmxLab) -> None:
    """With count 0 the address of a list is not looked at."""
    fields = [(F.ENTRY_MSR_LOAD_COUNT, F.ENTRY_MSR_LOAD_ADDRESS),
              (F.EXIT_MSR_LOAD_COUNT, F.EXIT_MSR_LOAD_ADDRESS),
              (F.EXIT_MSR_STORE_COUNT, F.EXIT_MSR_STORE_ADDRESS)]  # fmt: skip
    for run in lab.sweep([{count: 0, address: NOT_CANONICAL | 1} for count, address in fields]):
        run.exits_with(ExitReason.VMCALL)
    last = (1 << 64) - 16
    runs = lab.sweep([{count: 1, address: last} for count, address in fields])
    equal("the errors of lists that wrap", [run.result.error for run in runs], [7, 7, 7])


# -- fields ----------------------------------------------------------------------------------------


@guest_test("SDM: Loading Guest Control Registers, Debug Registers, and MSRs", "SDM: Saving Control"
            " Registers, Debug Registers, and MSRs", "SDM: Loading Host Control Registers, Debug"
            " Registers, MSRs")  # fmt: skip
def sysenter_msrs_are_always_loaded_and_saved(lab: VmxLab) -> None:
    """Entry loads the SYSENTER MSRs of the guest, an exit saves them and loads the host's."""
    msrs = [int(msr) for msr in (Msr.SYSENTER_CS, Msr.SYSENTER_ESP, Msr.SYSENTER_EIP)]
    names = ("CS", "ESP", "EIP")
    changes: Changes = {F[f"GUEST_SYSENTER_{n}"]: 0x1000 + i for i, n in enumerate(names)}
    changes |= {F[f"HOST_SYSENTER_{n}"]: 0x2000 + i for i, n in enumerate(names)}
    source = (
        _read_msrs(*msrs)
        + "; "
        + "; ".join(
            f"mov ${msr:#x}, %ecx; mov ${0x3000 + n}, %eax; xor %edx, %edx; wrmsr"
            for n, msr in enumerate(msrs)
        )
    )
    fields = [F[f"GUEST_SYSENTER_{n}"] for n in names]
    run = lab.run(source, lab.primary(changes, use_msr_bitmaps=1), reads=fields)
    run.ends()
    equal("the MSRs in L2", [run.registers[r] for r in ("r8", "r9", "r10")],
          [0x1000, 0x1001, 0x1002])  # fmt: skip
    equal("the fields after the exit", [run[f] for f in fields], [0x3000, 0x3001, 0x3002])
    with lab.batch() as batch:
        after = [batch.rdmsr(msr) for msr in msrs]
    equal("the MSRs in L1", [answer.value for answer in after], [0x2000, 0x2001, 0x2002])


PAT: Final = control(EntryControls, "load_pat")
PAT_GUEST, PAT_HOST, PAT_WRITTEN = 0x0007_0406_0005_0406, 0x0006_0406_0006_0406, 0x0606_0606
_WRITE_PAT: Final = f"mov ${int(Msr.PAT):#x}, %ecx; mov ${PAT_WRITTEN}, %eax; mov %eax, %edx; wrmsr"


@guest_test("SDM: VM-Entry Controls", "SDM: VM-Exit Controls", needs=[PAT])
def pat_is_loaded_and_saved_by_its_controls(lab: VmxLab) -> None:
    """IA32_PAT: each of "load" at entry, "save" and "load" at exit does its own and no more."""
    free = lab.primary(use_msr_bitmaps=1)
    fields: Changes = {F.GUEST_PAT: PAT_GUEST, F.HOST_PAT: PAT_HOST}
    own = lab.l1.rdmsr(Msr.PAT).value
    written = PAT_WRITTEN << 32 | PAT_WRITTEN
    source = f"{_read_msrs(int(Msr.PAT))}; {_WRITE_PAT}"
    for loads, saves, hosts in ((1, 1, 1), (0, 0, 0), (1, 0, 1), (0, 1, 1)):
        lab.l1.wrmsr(Msr.PAT, own)
        changes = lab.on_exit(lab.on_entry(free | fields, load_pat=loads), save_pat=saves,
                              load_pat=hosts)  # fmt: skip
        run = lab.run(source, changes)
        run.ends()
        what = f"with load {loads}, save {saves}, load at exit {hosts}: "
        equal(f"{what}PAT in L2", run.registers["r8"], (PAT_GUEST if loads else own) & 0xFFFFFFFF)
        equal(f"{what}the guest field", run[F.GUEST_PAT], written if saves else PAT_GUEST)
        equal(f"{what}PAT in L1", lab.l1.rdmsr(Msr.PAT).value, PAT_HOST if hosts else written)
    lab.l1.wrmsr(Msr.PAT, own)


EFER_CONTROL: Final = control(EntryControls, "load_efer")


@guest_test("SDM: VM-Entry Controls", "SDM: VM-Exit Controls", needs=[EFER_CONTROL])
def efer_is_loaded_and_saved_by_its_controls(lab: VmxLab) -> None:
    """EFER: L2 runs with its own, the exit saves it and loads the host's, each if asked."""
    own = lab.facts.l1.efer
    other = own ^ Efer.sce
    free = lab.primary(use_msr_bitmaps=1)
    fields: Changes = {F.GUEST_EFER: other, F.HOST_EFER: own}
    asked = lab.on_exit(lab.on_entry(free | fields, load_efer=1), save_efer=1, load_efer=1)
    run = lab.run(_read_msrs(int(Msr.EFER)), asked)
    run.ends()
    equal("EFER in L2", run.registers["r8"], other)
    equal("the guest field", run[F.GUEST_EFER], other)
    equal("EFER in L1", lab.l1.rdmsr(Msr.EFER).value, own)
    run = lab.run(_read_msrs(int(Msr.EFER)), lab.on_exit(
        lab.on_entry(free | fields, load_efer=0), save_efer=0, load_efer=0))  # fmt: skip
    run.ends()
    equal("EFER in L2 without the controls", run.registers["r8"], own)
    bad: dict[str, Changes] = {
        "a reserved bit": {F.GUEST_EFER: own | 1 << 40},
        "LMA against IA-32e mode guest": {F.GUEST_EFER: own & ~Efer.lma},
        "LME without LMA": {F.GUEST_EFER: own & ~Efer.lme},
    }
    runs = dict(zip(bad, lab.sweep([asked | changes for changes in bad.values()]), strict=True))
    each("the exit reason with", {what: run.entered and run[F.EXIT_REASON] for what, run in
                                  runs.items()}, 1 << 31 | 33)  # fmt: skip
    (run,) = lab.sweep([asked | {F.HOST_EFER: own & ~Efer.lma}])
    equal("the error with a host EFER without LMA", run.result.error, 8)


@guest_test("SDM: VM-Entry Controls", "SDM: VM-Exit Controls", "SDM: Loading Host Control"
            " Registers, Debug Registers, MSRs")  # fmt: skip
def debug_controls_are_loaded_and_saved_by_their_controls(lab: VmxLab) -> None:
    """DR7 and DEBUGCTL: "load" and "save debug controls"; an exit sets 400H and 0 in any case."""
    source = "mov %db7, %r8; mov $0x455, %eax; mov %rax, %db7"
    free = lab.primary(mov_dr_exiting=0)
    for loads in (1, 0) if lab.facts.capabilities[F.ENTRY_CONTROLS].allows(
        lab.fields[F.ENTRY_CONTROLS] & ~EntryControls.load_debug_controls) else (1,):  # fmt: skip
        changes = lab.on_exit(lab.on_entry(free, load_debug_controls=loads), save_debug_controls=1)
        run = lab.run(source, changes | {F.GUEST_DR7: 0x4AA})
        run.ends()
        equal("DR7 in L2", run.registers["r8"], 0x4AA if loads else 0x400)
        equal("the guest field", run[F.GUEST_DR7], 0x455)
        equal("DR7 of L1", lab.l1.read_dr(7).value, 0x400)
    debugctl = lab.l1.rdmsr(Msr.DEBUGCTL)
    equal("DEBUGCTL of L1", 0 if debugctl.fault else debugctl.value, 0)
