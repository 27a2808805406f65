"""VMX operation entered in the probe, and the fields of a VMCS that starts an L2 beside it.

SDM 3C, "Enabling and Entering VMX Operation" and "VM Entries".
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from undervisor.arch.vmx.capabilities import ControlCapability, VmxBasic, VmxMsr
from undervisor.arch.vmx.controls import (
    CONTROL_WORDS,
    AccessRights,
    ControlWord,
    EntryControls,
    ExitControls,
    PrimaryControls,
)
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.msr import FeatureControl
from undervisor.arch.x86.registers import Cr4
from undervisor.guest.probe.answers import Faulted
from undervisor.guest.probe.l1 import CODE_SEGMENT, DATA_SEGMENT, L1State, Runner, l1_state
from undervisor.guest.probe.program import (
    DATA,
    IDT,
    TSS,
    Block,
)
from undervisor.guest.probe.vmx import VmxOps

NO_VMCS = (1 << 64) - 1
SEGMENTS = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")
BUSY_TSS = 0x8B
UNUSABLE = AccessRights.of(unusable=1)
WANTED = {
    F.PIN_BASED_CONTROLS: 0,
    F.PRIMARY_CONTROLS: PrimaryControls.of(hlt_exiting=1),
    F.EXIT_CONTROLS: ExitControls.of(host_address_space_size=1),
    F.ENTRY_CONTROLS: EntryControls.of(ia32e_mode_guest=1),
}


@dataclass(frozen=True, slots=True)
class VmxFacts:
    """What the processor says of its VMX, and the probe's own state in VMX operation."""

    basic: VmxBasic
    capabilities: Mapping[F, ControlCapability]
    l1: L1State

    def adjust(self, field: F, value: int) -> int:
        """The supported setting of a control nearest to `value`."""
        return self.capabilities[field].adjust(value)


def vmx_on(probe: Runner, region: int, vmcs: int) -> VmxFacts:
    """Enter VMX operation on `probe`'s processor and make `vmcs` current and clear.

    `region` and `vmcs` are pages.  Faulted where an instruction faults or fails.
    """
    basic = _enable(probe, region, vmcs)
    batch = VmxOps()
    steps = [batch.vmxon(region), batch.vmclear(vmcs), batch.vmptrld(vmcs)]
    probe.run(batch)
    for step in steps:
        if not step.value.succeeded:
            raise Faulted(f"{step.what}: {step.value.outcome.value} {step.value.error}")
    return VmxFacts(basic, _capabilities(probe, basic), l1_state(probe))


def _enable(probe: Runner, region: int, vmcs: int) -> VmxBasic:
    """IA32_FEATURE_CONTROL, CR4.VMXE, the fixed bits of CR0 and CR4, the revision identifiers."""
    batch = VmxOps()
    control = batch.rdmsr(VmxMsr.IA32_FEATURE_CONTROL)
    basic = batch.rdmsr(VmxMsr.IA32_VMX_BASIC)
    cr0_fixed, cr4_fixed = (
        batch.rdmsr(msr) for msr in (VmxMsr.IA32_VMX_CR0_FIXED0, VmxMsr.IA32_VMX_CR4_FIXED0)
    )
    probe.run(batch)
    l1, batch = l1_state(probe), VmxOps()
    answers = [
        batch.write_cr(0, l1.cr0 | cr0_fixed.value),
        batch.write_cr(4, l1.cr4 | cr4_fixed.value | Cr4.vmxe),
    ]
    if not control.value & FeatureControl.lock:
        value = FeatureControl.of(lock=1, vmx_outside_smx=1)
        answers.append(batch.wrmsr(VmxMsr.IA32_FEATURE_CONTROL, control.value | value))
    revision = struct.pack("<I", VmxBasic(basic.value).revision)
    for page in (region, vmcs):
        batch.fill(page, 4096)
        batch.write(page, revision)
    probe.run(batch)
    for answer in answers:
        _ = answer.value
    return VmxBasic(basic.value)


def _capabilities(probe: Runner, basic: VmxBasic) -> dict[F, ControlCapability]:
    """Each control word's capability; a word whose MSR faults is not there."""

    def msr(word: ControlWord) -> int:
        return word.true_msr if basic.true_controls and word.true_msr else word.msr

    batch = VmxOps()
    values = {word: batch.rdmsr(msr(word)) for word in CONTROL_WORDS.values()}
    probe.run(batch)
    return {
        word.field: ControlCapability.from_msr(value.value, flexible=word.flexible)
        for word, value in values.items()
        if not value.fault
    }


def l2_fields(facts: VmxFacts, rip: int, rsp: int, processor: int = 0) -> dict[F, int]:
    """A VMX state for an L2 in 64-bit mode at CPL 0 that shares L1's page tables.

    Host state is the probe's own on `processor`; host RIP and RSP are set by the run.  HLT exits;
    the L2 has no descriptor tables, so an exception that does not exit is a triple fault.
    """
    fields: dict[F, int] = {f: facts.adjust(f, value) for f, value in WANTED.items()}
    fields |= {F.VMCS_LINK_POINTER: NO_VMCS, F.CR3_TARGET_COUNT: 0, F.EXCEPTION_BITMAP: 0}
    return fields | host_fields(facts.l1, Block(processor)) | _guest_fields(facts.l1, rip, rsp)


def host_fields(l1: L1State, block: Block) -> dict[F, int]:
    """The host-state area that comes back to the probe on the processor with `block`."""
    fields = {F[f"HOST_{name}_SELECTOR"]: DATA for name in ("ES", "SS", "DS")}
    return fields | {
        F.HOST_CS_SELECTOR: CODE_SEGMENT.selector,
        F.HOST_FS_SELECTOR: 0,
        F.HOST_GS_SELECTOR: 0,
        F.HOST_TR_SELECTOR: TSS,
        F.HOST_TR_BASE: block.tss,
        F.HOST_GDTR_BASE: block.gdt,
        F.HOST_IDTR_BASE: IDT,
        F.HOST_FS_BASE: 0,
        F.HOST_GS_BASE: 0,
        F.HOST_CR0: l1.cr0,
        F.HOST_CR3: l1.cr3,
        F.HOST_CR4: l1.cr4,
        F.HOST_SYSENTER_CS: 0,
        F.HOST_SYSENTER_ESP: 0,
        F.HOST_SYSENTER_EIP: 0,
    }


def _guest_fields(l1: L1State, rip: int, rsp: int) -> dict[F, int]:
    fields: dict[F, int] = {}
    for name in SEGMENTS:
        segment = CODE_SEGMENT if name == "CS" else DATA_SEGMENT
        usable = name in ("ES", "CS", "SS", "DS")
        fields[F[f"GUEST_{name}_SELECTOR"]] = segment.selector if usable else 0
        fields[F[f"GUEST_{name}_BASE"]] = 0
        fields[F[f"GUEST_{name}_LIMIT"]] = segment.limit if usable else 0
        rights = segment.access_rights if usable else UNUSABLE
        fields[F[f"GUEST_{name}_ACCESS_RIGHTS"]] = rights
    return fields | {
        F.GUEST_TR_ACCESS_RIGHTS: BUSY_TSS,
        F.GUEST_TR_LIMIT: 0x67,
        F.GUEST_GDTR_BASE: 0,
        F.GUEST_GDTR_LIMIT: 0,
        F.GUEST_IDTR_BASE: 0,
        F.GUEST_IDTR_LIMIT: 0,
        F.GUEST_CR0: l1.cr0,
        F.GUEST_CR3: l1.cr3,
        F.GUEST_CR4: l1.cr4,
        F.GUEST_DR7: 0x400,
        F.GUEST_RSP: rsp,
        F.GUEST_RIP: rip,
        F.GUEST_RFLAGS: 2,
        F.GUEST_INTERRUPTIBILITY_STATE: 0,
        F.GUEST_ACTIVITY_STATE: 0,
        F.GUEST_PENDING_DEBUG_EXCEPTIONS: 0,
        F.GUEST_DEBUGCTL: 0,
        F.GUEST_SYSENTER_CS: 0,
        F.GUEST_SYSENTER_ESP: 0,
        F.GUEST_SYSENTER_EIP: 0,
    }
