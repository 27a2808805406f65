"""What the silicon does itself, what the L0 does for it, and what nobody does.

Every feature name is in exactly one of `NATIVE`, `EMULATED` and `UNSUPPORTED`; a test says so, and
a page of the documentation is made from the tables.  A model offers only what is in the first
two.  A VMX or SVM feature is taken out by moving its line to `UNSUPPORTED`.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

from undervisor.arch.x86.msr import Msr


def _each(table: Mapping[str, str]) -> dict[str, str]:
    """A table of `reason -> names` as `name -> reason`; a name given twice fails at import."""
    out: dict[str, str] = {}
    for reason, names in table.items():
        for name in names.split():
            if name in out:
                raise TypeError(f"{name} is listed twice")
            out[name] = reason
    return out


NATIVE: dict[str, str] = _each(
    {
        "base instruction set": "fpu cx8 cmov mmx clflush lahf-lm 3dnowprefetch",
        "the SSE family and MMX": "fxsr sse sse2 pni ssse3 sse4.1 sse4.2 sse4a mmxext",
        "paging": "pse pae pge pse36 nx pdpe1gb lm smep smap",
        "bit manipulation and arithmetic": "popcnt movbe abm bmi1 bmi2 adx cx16",
        "cryptography": "aes pclmulqdq",
        "extended state, x87 and SSE only": "xsave xsaveopt xgetbv1",
        "segment bases": "fsgsbase",
        "cache control and strings": "clflushopt erms",
        "debug extensions; the I/O exit carries out I/O breakpoints": "de",
    }
)
"""Feature -> what it belongs to; each was executed in a guest on the silicon."""

EMULATED: dict[str, str] = _each(
    {
        "every RDMSR and WRMSR exits": "msr",
        "the virtual clock counts at 1 GHz whatever the processor does": (
            "tsc rdtscp invtsc tsc-adjust arat"
        ),
        "the local APIC is a device of the L0": "apic x2apic tsc-deadline",
        "SYSENTER and SYSCALL exit": "sep syscall",
        "no machine check is ever raised; the registers are there": "mce mca",
        "memory types have no effect; the registers are there": "mtrr pat",
        "emulated at the undefined-opcode exit": "xsaves rdpid invpcid",
        "translations are never kept across a load of CR3, which PCIDs permit": "pcid",
        "numbers come from a generator with a fixed seed, at the undefined-opcode exit": (
            "rdrand rdseed"
        ),
        "MONITOR and MWAIT exit": "monitor",
        "the model's own leaves": "hypervisor topoext cmp-legacy",
        "nothing speculates, so that the registers need only to exist": (
            "spec-ctrl stibp ssbd md-clear flush-l1d arch-capabilities "
            "ibpb ibrs amd-stibp amd-ssbd amd-no-ssb "
            "rdctl-no ibrs-all skip-l1dfl-vmentry ssb-no mds-no pschange-mc-no taa-no "
            "sbdr-ssdp-no fbsdp-no psdp-no gds-no rfds-no bhi-no pbrsb-no"
        ),
        "nested SVM": (
            "svm npt svm-lock nrip-save vmcb-clean flushbyasid decodeassists pause-filter "
            "vgif v-vmsave-vmload"
        ),
        "nested VMX": (
            "vmx vmx-ins-outs vmx-true-ctls "
            "vmx-intr-exit vmx-nmi-exit vmx-vnmi vmx-preemption-timer "
            "vmx-vintr-pending vmx-tsc-offset vmx-hlt-exit vmx-invlpg-exit vmx-mwait-exit "
            "vmx-rdpmc-exit vmx-rdtsc-exit vmx-cr3-load-noexit vmx-cr3-store-noexit "
            "vmx-cr8-load-exit vmx-cr8-store-exit vmx-flexpriority vmx-vnmi-pending "
            "vmx-movdr-exit vmx-io-exit vmx-io-bitmap vmx-mtf vmx-msr-bitmap vmx-monitor-exit "
            "vmx-pause-exit vmx-secondary-ctls "
            "vmx-apicv-xapic vmx-ept vmx-desc-exit vmx-rdtscp-exit vmx-apicv-x2apic vmx-vpid "
            "vmx-wbinvd-exit vmx-unrestricted-guest vmx-apicv-register vmx-apicv-vid vmx-ple "
            "vmx-posted-intr "
            "vmx-rdrand-exit vmx-invpcid-exit vmx-vmfunc vmx-shadow-vmcs vmx-rdseed-exit "
            "vmx-pml vmx-xsaves vmx-eptp-switching "
            "vmx-exit-nosave-debugctl vmx-exit-ack-intr vmx-exit-save-pat vmx-exit-load-pat "
            "vmx-exit-save-efer vmx-exit-load-efer vmx-exit-save-preemption-timer "
            "vmx-entry-noload-debugctl vmx-entry-ia32e-mode vmx-entry-load-pat "
            "vmx-entry-load-efer "
            "vmx-store-lma vmx-activity-hlt vmx-activity-shutdown vmx-activity-wait-sipi "
            "vmx-vmwrite-vmexit-fields vmx-zero-len-inject "
            "vmx-ept-execonly vmx-page-walk-4 vmx-ept-2mb vmx-ept-1gb vmx-invept vmx-eptad "
            "vmx-invept-single-context vmx-invept-all-context vmx-invvpid "
            "vmx-invvpid-single-addr vmx-invvpid-single-context vmx-invvpid-all-context "
            "vmx-invvpid-single-context-noglobals"
        ),
    }
)
"""Feature -> how the L0 provides what the silicon lacks."""

UNSUPPORTED: dict[str, str] = _each(
    {
        "the silicon has no virtual-8086 mode enhancements": "vme",
        "the silicon has no wider registers than SSE's": (
            "avx f16c fma avx2 fma4 xop vaes vpclmulqdq avx-vnni avx-ifma "
            "avx512f avx512dq avx512ifma avx512pf avx512er avx512cd avx512bw avx512vl "
            "avx512vbmi avx512vbmi2 avx512vnni avx512bitalg avx512-vpopcntdq avx512-4vnniw "
            "avx512-4fmaps avx512-vp2intersect avx512-bf16 avx512-fp16 "
            "amx-bf16 amx-tile amx-int8"
        ),
        "the instruction raises #UD on the silicon": (
            "sha-ni gfni clwb clzero pku movdiri movdir64b serialize 3dnow 3dnowext "
            "monitorx rdpru pcommit"
        ),
        "the silicon takes the encoding for another instruction": "tbm lwp waitpkg",
        "the silicon runs it as a no-operation or partly": "mpx cldemote wbnoinvd prefetchwt1",
        "the silicon's XRSTOR does not know the compacted form": "xsavec",
        "the silicon's FXSAVE stores the XMM registers whatever EFER.FFXSR says": "fxsr-opt",
        "the silicon's LOCK MOV CR0 does not reach the local APIC": "cr8legacy",
        "the silicon never checks the alignment of SSE operands": "misalignsse",
        "the silicon stores the bit in CR4 and does not act on it": "umip",
        "nothing here walks five levels": "la57 vmx-page-walk-5",
        "no transaction ever starts": "hle rtm rtm-always-abort tsx-ldtrk tsx-ctrl",
        "no performance monitoring unit": (
            "pdcm perfctr-core perfctr-nb aperfmperf vmx-exit-load-perf-global-ctrl "
            "vmx-entry-load-perf-global-ctrl vmx-exit-save-perf-global-ctrl"
        ),
        "no tracing, branch records or debug store": (
            "ds dtes64 ds-cpl intel-pt arch-lbr ibs sdbg lbrv "
            "vmx-exit-clear-rtit-ctl vmx-entry-load-rtit-ctl vmx-pt-conceal-exit "
            "vmx-pt-conceal-entry vmx-pt-conceal vmx-exit-clear-lbr-ctl vmx-entry-load-lbr-ctl "
            "vmx-pt-guest-physical"
        ),
        "no power and thermal management": (
            "acpi tm tm2 est pbe dtherm turbo-boost pln ecmd ptm hwp hybrid"
        ),
        "no enclaves, trusted launch or memory encryption": (
            "smx sgx sgxlc tme pconfig kl vmx-encls-exit vmx-enclv-exit vmx-pconfig-exit"
        ),
        "no control-flow enforcement": (
            "cet-ss cet-ibt vmx-exit-load-cet vmx-entry-load-cet vmx-ept-supervisor-shadow-stack"
        ),
        "no protection keys": "pks vmx-exit-load-pkrs vmx-entry-load-pkrs",
        "no user interrupts": "uintr vmx-exit-clear-uinv vmx-entry-load-uinv",
        "not a feature of this machine's topology or chipset": (
            "pn ss cid xtpr dca extapic osvw wdt amd-ppin pqm pqe core-capability srbds-ctrl "
            "bus-lock-detect virt-ssbd"
        ),
        "the silicon keeps the old behaviour of the x87 pointers": (
            "fdp-excptn-only zero-fcs-fds xsaveerptr"
        ),
        "not written yet": (
            "fred lkgs lam xfd tce fsrm fzrm fsrs fsrc auto-ibrs no-nested-data-bp "
            "lfence-always-serializing null-sel-clr-base "
            "tsc-scale pfthreshold avic x2avic gmet v-spec-ctrl vnmi svme-addr-chk "
            "vmx-tsc-scaling vmx-user-wait-pause vmx-ept-violation-ve "
            "vmx-tertiary-ctls vmx-exit-secondary-ctls vmx-ept-advanced-exitinfo "
            "vmx-mbec vmx-spp vmx-pasid vmx-bus-lock-detection vmx-instruction-timeout "
            "vmx-exit-clear-bndcfgs vmx-entry-load-bndcfgs vmx-entry-load-fred "
            "vmx-entry-load-spec-ctrl vmx-nested-exception"
        ),
        "the silicon decides by the vector whether an error code is pushed": "vmx-any-errcode",
        "speculation is not to be imitated": "rsba",
        "there is no TPM to measure what SKINIT starts": "skinit",
        "there is no system-management mode to monitor": "vmx-dual-monitor",
    }
)
"""Feature -> why no model offers it."""


STORED_ONLY: dict[int, str] = {
    Msr.DEBUGCTL: "no branch is recorded; a single step is never one of branches only",
    Msr.PAT: "all memory is coherent write-back memory",
    Msr.MTRR_DEF_TYPE: "the same, and so for the other MTRRs",
    Msr.MISC_ENABLE: "only the CPUID limit, MONITOR and the XD bit have an effect",
    Msr.SPEC_CTRL: "nothing speculates",
    Msr.MCG_CTL: "no machine check is ever raised",
    Msr.SYSCFG: "memory is where the machine put it; so for IORRs, TOP_MEM and the SMM registers",
    Msr.HWCR: "only McStatusWrEn has an effect",
}
"""MSRs that keep what is written, within their rules, and what does not happen."""

FOREIGN: dict[str, str] = _each(
    {
        "it is KVM's interface to its guests, not a processor's": (
            "kvm-asyncpf kvm-asyncpf-int kvm-hint-dedicated kvm-mmu kvm-msi-ext-dest-id "
            "kvm-nopiodelay kvm-poll-control kvm-pv-eoi kvm-pv-ipi kvm-pv-sched-yield "
            "kvm-pv-tlb-flush kvm-pv-unhalt kvm-steal-time kvmclock kvmclock-stable-bit"
        ),
        "no processor of these vendors has it": (
            "ace2 ace2-en phe phe-en pmm pmm-en xcrypt xcrypt-en xstore xstore-en ia64 nodeid-msr"
        ),
        "it is a detail of a feature that is not offered": (
            "full-width-write intel-pt-lip split-lock-detect sgx1 sgx2 sgx-debug sgx-exinfo "
            "sgx-kss sgx-mode64 sgx-provisionkey sgx-tokenkey"
        ),
    }
)
"""Names that QEMU's users may write for what no model here describes -> why."""


def _disjoint() -> None:
    """Fail at import where a feature has two fates."""
    for one, other in combinations((NATIVE, EMULATED, UNSUPPORTED, FOREIGN), 2):
        if both := one.keys() & other.keys():
            raise TypeError(f"{', '.join(sorted(both))}: listed in two tables")


_disjoint()

SUPPORTED: frozenset[str] = frozenset(NATIVE) | frozenset(EMULATED)
"""Every feature that a model may offer."""
