"""What the rules of VM entry depend on, read from a running processor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from undervisor.arch.vmx.capabilities import ProcessorFacts, VmxCapabilities, VmxMsr
from undervisor.arch.vmx.fields import FieldArea
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.cpuid import Leaf
from undervisor.arch.x86.msr import SPEC_CTRL_BITS, DebugCtl
from undervisor.conformance.entries.features import Features, read_features
from undervisor.guest.probe.l1 import L1State, Runner
from undervisor.guest.probe.vmx import VmxOps

CHUNK = 64
"""Fields that one VMREAD loop asks for."""


@dataclass(frozen=True, slots=True)
class VmxProcessor:
    """A processor in VMX operation: its capabilities, the fields it knows, the probe's own state.

    `fields` are those that VMREAD knows and an entry may need written.
    """

    capabilities: VmxCapabilities
    fields: frozenset[int]
    l1: L1State


def read_capabilities(probe: Runner) -> VmxCapabilities:
    """The VMX MSRs and the features that the rules look at."""
    features = read_features(probe)
    batch = VmxOps()
    msrs = {int(msr): batch.rdmsr(msr) for msr in VmxMsr}
    counters = batch.cpuid(Leaf.PERFORMANCE_MONITORING)
    probe.run(batch)
    values = {msr: one.outcome for msr, one in msrs.items() if isinstance(one.outcome, int)}
    monitoring = counters.value["rax"], counters.value["rdx"]
    return VmxCapabilities.from_msrs(values, _facts(features, monitoring))


def _facts(features: Features, monitoring: tuple[int, int]) -> ProcessorFacts:
    names, plain = features.names, ProcessorFacts()
    spec_ctrl = 0
    for name, bit in SPEC_CTRL_BITS.items():
        spec_ctrl |= bit if name in names else 0
    return ProcessorFacts(
        physical_address_width=features.physical_width,
        linear_address_width=features.linear_width,
        long_mode="lm" in names,
        no_execute="nx" in names,
        syscall="syscall" in names,
        pages_1g="pdpe1gb" in names,
        rtm="rtm" in names,
        sgx="sgx" in names,
        smx="smx" in names,
        bus_lock_detection="bus-lock-detect" in names,
        user_interrupts="uintr" in names,
        cet_shadow_stack="cet-ss" in names,
        cet_indirect_branch="cet-ibt" in names,
        lam="lam" in names,
        perf_global_ctrl=_counters(*monitoring),
        debugctl=DebugCtl.DECLARED,
        rtit_ctl=plain.rtit_ctl if "intel-pt" in names else 0,
        lbr_ctl=plain.lbr_ctl if "arch-lbr" in names else 0,
        spec_ctrl=spec_ctrl,
        fred="fred" in names,
    )


def _counters(eax: int, edx: int) -> int:
    """The bits of IA32_PERF_GLOBAL_CTRL. SDM 2A "CPUID", leaf 0AH; there from version 2 on."""
    if eax & 0xFF < 2:
        return 0
    return (1 << (eax >> 8 & 0xFF)) - 1 | ((1 << (edx & 0x1F)) - 1) << 32


def known_fields(probe: Runner, scratch: int) -> frozenset[int]:
    """The fields that VMREAD knows, of those that an entry reads; `scratch` is two free pages."""
    known: set[int] = set()
    for fields in _chunks([f for f in F if f.area is not FieldArea.READ_ONLY]):
        batch = VmxOps()
        values = batch.vmreads(fields, scratch)
        probe.run(batch)
        known |= {field for field, value in values.value.items() if value is not None}
    return frozenset(known)


def _chunks(fields: list[F]) -> Iterable[list[F]]:
    return (fields[at : at + CHUNK] for at in range(0, len(fields), CHUNK))
