"""The MSRs of SVM: VM_CR with its lock, VM_HSAVE_PA, EFER, and branch records."""

from __future__ import annotations

from typing import Final

from undervisor.arch.svm.vmcb import LbrControl
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.arch.x86.events import Vector
from undervisor.arch.x86.msr import Msr, VmCr
from undervisor.arch.x86.registers import Efer
from undervisor.conformance.expect import Lacking, each, equal
from undervisor.conformance.suite import guest_test
from undervisor.conformance.svm.instructions import vector_of, vectors
from undervisor.conformance.svm.lab import SvmLab
from undervisor.conformance.svm.needs import feature

KEY: Final = 0x1234_5678_9ABC_DEF0


def unlocked(lab: SvmLab) -> int:
    """VM_CR; Lacking where the firmware has locked it."""
    value = lab.l1.rdmsr(Msr.VM_CR).value
    if value & VmCr.lock:
        raise Lacking("a VM_CR that the firmware left unlocked")
    return value


def _svm_off(lab: SvmLab) -> None:
    lab.l1.wrmsr(Msr.EFER, lab.facts.l1.efer & ~Efer.svme)


@guest_test("APM: VM_CR MSR (C001_0114h)")
def the_reserved_bits_of_vm_cr_fault(lab: SvmLab) -> None:
    """Writing a reserved bit of VM_CR, 5 to 63, is #GP(0)."""
    value = unlocked(lab)
    with lab.batch() as batch:
        writes = {f"bit {n}": batch.wrmsr(Msr.VM_CR, value | 1 << n) for n in (5, 6, 31, 32, 63)}
    each("the exception", vectors(writes), Vector.GP)


@guest_test("APM: VM_CR MSR (C001_0114h)", "APM: Enabling SVM")
def svmdis_cannot_be_set_while_svm_is_on(lab: SvmLab) -> None:
    """Setting VM_CR.SVMDIS while EFER.SVME is 1 is #GP(0)."""
    value = unlocked(lab)
    write = lab.l1.wrmsr(Msr.VM_CR, value | VmCr.svmdis)
    equal("the exception", vector_of(write), Vector.GP)
    equal("VM_CR", lab.l1.rdmsr(Msr.VM_CR).value, value)


@guest_test("APM: VM_CR MSR (C001_0114h)", "APM: Enabling SVM")
def svm_cannot_be_enabled_while_svmdis_is_set(lab: SvmLab) -> None:
    """While VM_CR.SVMDIS is 1 EFER.SVME is reserved: setting it is #GP(0)."""
    value = unlocked(lab)
    _svm_off(lab)
    lab.l1.wrmsr(Msr.VM_CR, value | VmCr.svmdis)
    equal("SVMDIS", lab.l1.rdmsr(Msr.VM_CR).value & VmCr.svmdis, VmCr.svmdis)
    equal("the exception", vector_of(lab.l1.wrmsr(Msr.EFER, lab.facts.l1.efer)), Vector.GP)
    lab.l1.wrmsr(Msr.VM_CR, value)
    equal(
        "the exception without SVMDIS", vector_of(lab.l1.wrmsr(Msr.EFER, lab.facts.l1.efer)), None
    )
    lab.run("nop").ends()


@guest_test("APM: VM_CR MSR (C001_0114h)", "APM: SVM-Lock", needs=[feature("svml")])
def the_lock_makes_svmdis_read_only(lab: SvmLab) -> None:
    """VM_CR.LOCK makes LOCK and SVMDIS read-only: writes of them are ignored, R_INIT is written."""
    value = unlocked(lab)
    _svm_off(lab)
    lab.l1.wrmsr(Msr.VM_CR, value | VmCr.lock | VmCr.svmdis)
    lab.l1.wrmsr(Msr.VM_CR, VmCr.r_init)
    got = lab.l1.rdmsr(Msr.VM_CR).value
    equal("VM_CR", got, VmCr.lock | VmCr.svmdis | VmCr.r_init)
    equal("the exception", vector_of(lab.l1.wrmsr(Msr.EFER, lab.facts.l1.efer)), Vector.GP)


@guest_test("APM: SVM-Lock", "APM: SVM_KEY MSR (C001_0118h)", needs=[feature("svml")])
def the_right_key_opens_the_lock(lab: SvmLab) -> None:
    """Writing the key to SVM_KEY while LOCK is 1 clears LOCK; any other value does not."""
    value = unlocked(lab)
    lab.l1.wrmsr(Msr.SVM_LOCK_KEY, KEY)
    lab.l1.wrmsr(Msr.VM_CR, value | VmCr.lock)
    got = {}
    for name, key in (("a wrong key", KEY + 1), ("zero", 0), ("the key", KEY)):
        lab.l1.wrmsr(Msr.SVM_LOCK_KEY, key)
        got[name] = bool(lab.l1.rdmsr(Msr.VM_CR).value & VmCr.lock)
    each("VM_CR.LOCK", got, lambda name: name != "the key")


@guest_test("APM: SVM-Lock", "APM: SVM_KEY MSR (C001_0118h)", needs=[feature("svml")])
def a_lock_without_a_key_stays(lab: SvmLab) -> None:
    """While the key is 0, only a reset opens the lock."""
    value = unlocked(lab)
    lab.l1.wrmsr(Msr.SVM_LOCK_KEY, 0)
    lab.l1.wrmsr(Msr.VM_CR, value | VmCr.lock)
    lab.l1.wrmsr(Msr.SVM_LOCK_KEY, 0)
    lab.l1.wrmsr(Msr.SVM_LOCK_KEY, KEY)
    lab.l1.wrmsr(Msr.SVM_LOCK_KEY, KEY)
    equal("VM_CR.LOCK", lab.l1.rdmsr(Msr.VM_CR).value & VmCr.lock, VmCr.lock)


@guest_test("APM: VM_HSAVE_PA MSR (C001_0117h)")
def the_host_save_area_is_a_page_below_the_physical_width(lab: SvmLab) -> None:
    """VM_HSAVE_PA takes a 4-KiB-aligned address below MAXPHYADDR; others are #GP(0)."""
    region, width = lab.places.region, lab.physical_width()
    bad = [region | 1, region | 0x800, region | 1 << width, 1 << 52, 1 << 63]
    with lab.batch() as batch:
        writes = {f"{address:#x}": batch.wrmsr(Msr.VM_HSAVE_PA, address) for address in bad}
        kept = batch.rdmsr(Msr.VM_HSAVE_PA)
        top = batch.wrmsr(Msr.VM_HSAVE_PA, (1 << width) - 0x1000)
        got = batch.rdmsr(Msr.VM_HSAVE_PA)
        batch.wrmsr(Msr.VM_HSAVE_PA, region)
    each("the exception", vectors(writes), Vector.GP)
    equal("VM_HSAVE_PA", kept.value, region)
    equal("the exception of the last page", vector_of(top), None)
    equal("VM_HSAVE_PA", got.value, (1 << width) - 0x1000)


@guest_test("APM: Extended Feature Enable Register (EFER)", "APM: Enabling SVM")
def svm_can_be_switched_off_and_on(lab: SvmLab) -> None:
    """EFER.SVME cleared and set again: L2 runs as before."""
    lab.run("nop").ends()
    _svm_off(lab)
    equal("EFER.SVME", lab.l1.rdmsr(Msr.EFER).value & Efer.svme, 0)
    lab.l1.wrmsr(Msr.EFER, lab.facts.l1.efer)
    lab.run("nop").ends()


@guest_test("APM: Extended Feature Enable Register (EFER)")
def the_reserved_bits_of_efer_fault(lab: SvmLab) -> None:
    """Each bit of EFER that is not defined is #GP(0) when it is set."""
    reserved = Efer.reserved()
    with lab.batch() as batch:
        writes = {
            f"bit {n}": batch.wrmsr(Msr.EFER, lab.facts.l1.efer | 1 << n)
            for n in range(64)
            if reserved >> n & 1
        }
        after = batch.rdmsr(Msr.EFER)
    each("the exception", vectors(writes), Vector.GP)
    equal("EFER", after.value, lab.facts.l1.efer)


@guest_test("APM: LBR Virtualization", needs=[feature("lbr_virt")])
def branch_records_are_switched_with_lbr_virtualization(lab: SvmLab) -> None:
    """With LBR virtualization L2's DebugCtl is the VMCB's, saved at the exit; L1's comes back."""
    lab.l1.wrmsr(Msr.DEBUGCTL, 0)
    code = f"mov ${int(Msr.DEBUGCTL):#x}, %ecx; rdmsr; mov %eax, %ebx; xor %eax, %eax; wrmsr"
    begin = {F.LBR_CONTROL: int(LbrControl.lbr_virtualization_enable), F.DBGCTL: 1}
    run = lab.run(code, begin)
    run.ends()
    equal("what L2 reads", run.registers["rbx"], 1)
    equal("DBGCTL after the exit", run[F.DBGCTL], 0)
    equal("L1's DebugCtl", lab.l1.rdmsr(Msr.DEBUGCTL).value, 0)


@guest_test("APM: LBR Virtualization", "APM: VMCB Layout, State Save Area")
def without_lbr_virtualization_branch_records_stay(lab: SvmLab) -> None:
    """While LBR virtualization is off, VMRUN and #VMEXIT do not touch the VMCB's branch records."""
    fields = (F.DBGCTL, F.BR_FROM, F.BR_TO, F.LAST_EXCP_FROM, F.LAST_EXCP_TO)
    values = {field: 0x1000 * number for number, field in enumerate(fields)}
    run = lab.run("jmp 1f; 1: int3", values)
    run.delivers(Vector.BP)
    each("the field after the exit", {f: run[f] for f in fields}, lambda f: values[f])
