"""What a processor offers to L1, by the names that QEMU gives the features, and what differs."""

from __future__ import annotations

from dataclasses import dataclass

from undervisor.arch.vmx.capabilities import VmxMsr
from undervisor.host.access.protocol import Host
from undervisor.host.fact import Fact, Known
from undervisor.host.facts.machine import Machine

# QEMU's feature names by control word, in the order of bits; an empty word is a bit without one.
_NAMES: dict[str, dict[int, str]] = {
    "pin": {0: "intr-exit", 3: "nmi-exit", 5: "vnmi", 6: "preemption-timer", 7: "posted-intr"},
    "primary": {
        2: "vintr-pending", 3: "tsc-offset", 7: "hlt-exit", 9: "invlpg-exit", 10: "mwait-exit",
        11: "rdpmc-exit", 12: "rdtsc-exit", 15: "cr3-load-noexit", 16: "cr3-store-noexit",
        19: "cr8-load-exit", 20: "cr8-store-exit", 21: "flexpriority", 22: "vnmi-pending",
        23: "movdr-exit", 24: "io-exit", 25: "io-bitmap", 27: "mtf", 28: "msr-bitmap",
        29: "monitor-exit", 30: "pause-exit", 31: "secondary-ctls",
    },
    "secondary": {
        0: "apicv-xapic", 1: "ept", 2: "desc-exit", 3: "rdtscp-exit", 4: "apicv-x2apic", 5: "vpid",
        6: "wbinvd-exit", 7: "unrestricted-guest", 8: "apicv-register", 9: "apicv-vid", 10: "ple",
        11: "rdrand-exit", 12: "invpcid-exit", 13: "vmfunc", 14: "shadow-vmcs", 15: "encls-exit",
        16: "rdseed-exit", 17: "pml", 20: "xsaves", 25: "tsc-scaling", 26: "enable-user-wait-pause",
    },
    "exit": {
        2: "exit-nosave-debugctl", 12: "exit-load-perf-global-ctrl", 15: "exit-ack-intr",
        18: "exit-save-pat", 19: "exit-load-pat", 20: "exit-save-efer", 21: "exit-load-efer",
        22: "exit-save-preemption-timer", 23: "exit-clear-bndcfgs", 25: "exit-clear-rtit-ctl",
        28: "exit-save-cet", 29: "exit-load-pkrs", 31: "exit-secondary-ctls",
    },
    "entry": {
        2: "entry-noload-debugctl", 9: "entry-ia32e-mode", 13: "entry-load-perf-global-ctrl",
        14: "entry-load-pat", 15: "entry-load-efer", 16: "entry-load-bndcfgs",
        18: "entry-load-rtit-ctl", 20: "entry-load-cet", 22: "entry-load-pkrs",
        23: "entry-load-fred",
    },
}  # fmt: skip

_WORDS: tuple[tuple[str, VmxMsr], ...] = (
    ("pin", VmxMsr.IA32_VMX_PINBASED_CTLS),
    ("primary", VmxMsr.IA32_VMX_PROCBASED_CTLS),
    ("secondary", VmxMsr.IA32_VMX_PROCBASED_CTLS2),
    ("exit", VmxMsr.IA32_VMX_EXIT_CTLS),
    ("entry", VmxMsr.IA32_VMX_ENTRY_CTLS),
)


@dataclass(frozen=True, slots=True)
class Difference:
    """A feature that the source has and the destination lacks, and where that is reported."""

    name: str
    where: str

    def __str__(self) -> str:
        return f"{self.name} ({self.where})" if self.where else self.name


def vmx_msrs(host: Host, machine: Machine) -> dict[VmxMsr, Fact[int]]:
    """The capability MSRs of the five control words; empty where the processor has no VMX."""
    if machine.processor.extension != "vmx" or not machine.processor.has("vmx"):
        return {}
    return {msr: host.msr(msr) for _, msr in _WORDS}


def missing_controls(
    source: dict[VmxMsr, Fact[int]], destination: dict[VmxMsr, Fact[int]]
) -> tuple[list[Difference], list[str]]:
    """Controls that may be 1 at the source and not at the destination, and the MSRs that could
    not be compared."""
    found, unknown = [], []
    for word, msr in _WORDS:
        mine, other = source.get(msr), destination.get(msr)
        if not isinstance(mine, Known) or not isinstance(other, Known):
            unknown.append(msr.name)
            continue
        # The upper half of these MSRs holds the allowed 1-settings.
        lost = (mine.value >> 32) & ~(other.value >> 32)
        for bit in range(32):
            if lost >> bit & 1:
                name = _NAMES[word].get(bit, f"{word}-bit-{bit}")
                found.append(Difference(f"vmx-{name}", f"{msr.name} bit {bit + 32}"))
    return found, unknown


_OF_THE_MACHINE = (
    "acpi_tm aperfmperf arat art bts constant_tsc cpuid cpuid_fault dca ds_cpl dtes64 dtherm dts",
    "epb est extd_apicid hwp hwp_notify hwp_act_window hwp_epp hwp_pkg_req ida intel_ppin",
    "ht hw_pstate cpb monitor nonstop_tsc nopl pbe pebs pdcm pln pts rapl rep_good sdbg smx tm",
    "tm2 tsc_known_freq tsc_reliable xtopology xtpr hypervisor skinit wdt rdt_a cat_l3 cat_l2",
    "cdp_l3 cqm cqm_llc cqm_occup_llc cqm_mbm_total cqm_mbm_local mba split_lock_detect sev",
    "sev_es sev_snp sme debug_swap proc_feedback perfctr_nb perfctr_llc ibs lwp irperf",
    "tpr_shadow svm_lock amd_ppin",
)
_NOT_OF_GUESTS = frozenset(flag for line in _OF_THE_MACHINE for flag in line.split())
"""Flags about the machine, its power and its firmware, which guests are not given."""


def missing_flags(source: Machine, destination: Machine) -> Fact[list[Difference]]:
    """Flags that guests can be given at the source and not at the destination."""
    mine, other = source.processor.flags, destination.processor.flags
    if not isinstance(mine, Known):
        return mine
    if not isinstance(other, Known):
        return other
    lost = sorted(mine.value - other.value - _NOT_OF_GUESTS)
    return Known([Difference(flag, "") for flag in lost], "/proc/cpuinfo")
