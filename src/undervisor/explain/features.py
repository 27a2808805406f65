"""Every bit of the capability MSRs: its name in the manual, in QEMU and in /proc/cpuinfo.

QEMU's names are those of `-cpu NAME,+feature` and of libvirt's `<feature name=...>`; an empty one
means that QEMU has none (such a bit can't be switched from outside, or is always there).  The
flags of /proc/cpuinfo are those of its line "vmx flags", which shows only some.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from undervisor.arch.bits import Bits, Register
from undervisor.arch.svm.capabilities import SvmFeatures, SvmFeatures2
from undervisor.arch.vmx import controls as c
from undervisor.arch.vmx.capabilities import (
    ControlCapability,
    EptVpidCapability,
    VmxBasic,
    VmxMisc,
    VmxMsr,
)
from undervisor.arch.vmx.controls import CONTROL_WORDS, ControlWord
from undervisor.arch.vmx.fields import VmcsField as F


class Setting(Enum):
    """What a processor lets a control be, or whether it has a reported feature."""

    NO = "no"
    ALLOWED = "allowed"
    FORCED = "forced"
    DEFAULT = "default"
    YES = "yes"
    UNKNOWN = "unknown"

    @property
    def usable(self) -> bool:
        """Whether the feature can be used: the control may be 1, or the fact is reported."""
        return self not in (Setting.NO, Setting.UNKNOWN)


@dataclass(frozen=True, slots=True)
class Feature:
    """One bit (or number) of a capability MSR; `word` is its control word, None for a report."""

    group: str
    msr: int
    bits: Bits
    manual: str
    qemu: str = ""
    cpuinfo: str = ""
    word: ControlWord | None = None

    @property
    def is_number(self) -> bool:
        """Whether it is a number of several bits."""
        return self.bits.msb != self.bits.lsb

    @property
    def qemu_frees(self) -> bool:
        """Whether QEMU's feature means that the default1 control may be 0."""
        return self.word is not None and bool(self.word.default1 >> self.bits.lsb & 1)


GROUPS: dict[F, str] = {
    F.PIN_BASED_CONTROLS: "Pin-based VM-execution controls",
    F.PRIMARY_CONTROLS: "Primary processor-based VM-execution controls",
    F.SECONDARY_CONTROLS: "Secondary processor-based VM-execution controls",
    F.TERTIARY_CONTROLS: "Tertiary processor-based VM-execution controls",
    F.VM_FUNCTION_CONTROLS: "VM functions",
    F.EXIT_CONTROLS: "Primary VM-exit controls",
    F.SECONDARY_EXIT_CONTROLS: "Secondary VM-exit controls",
    F.ENTRY_CONTROLS: "VM-entry controls",
}
SHORT: dict[str, F] = {
    "pin": F.PIN_BASED_CONTROLS,
    "primary": F.PRIMARY_CONTROLS,
    "secondary": F.SECONDARY_CONTROLS,
    "tertiary": F.TERTIARY_CONTROLS,
    "vmfunc": F.VM_FUNCTION_CONTROLS,
    "exit": F.EXIT_CONTROLS,
    "exit2": F.SECONDARY_EXIT_CONTROLS,
    "entry": F.ENTRY_CONTROLS,
}
"""Short names of the control words on the command line."""

# A line: the bit's name in `arch`, QEMU's name, the flag of /proc/cpuinfo ("-" for none).
_TABLE: dict[type[Register], str] = {
    c.PinBasedControls: """
external_interrupt_exiting vmx-intr-exit -
nmi_exiting vmx-nmi-exit -
virtual_nmis vmx-vnmi vnmi
preemption_timer vmx-preemption-timer preemption_timer
process_posted_interrupts vmx-posted-intr posted_intr
""",
    c.PrimaryControls: """
interrupt_window_exiting vmx-vintr-pending -
use_tsc_offsetting vmx-tsc-offset tsc_offset
hlt_exiting vmx-hlt-exit -
invlpg_exiting vmx-invlpg-exit -
mwait_exiting vmx-mwait-exit -
rdpmc_exiting vmx-rdpmc-exit -
rdtsc_exiting vmx-rdtsc-exit -
cr3_load_exiting vmx-cr3-load-noexit -
cr3_store_exiting vmx-cr3-store-noexit -
cr8_load_exiting vmx-cr8-load-exit -
cr8_store_exiting vmx-cr8-store-exit -
use_tpr_shadow vmx-flexpriority vtpr
nmi_window_exiting vmx-vnmi-pending -
mov_dr_exiting vmx-movdr-exit -
unconditional_io_exiting vmx-io-exit -
use_io_bitmaps vmx-io-bitmap -
monitor_trap_flag vmx-mtf mtf
use_msr_bitmaps vmx-msr-bitmap -
monitor_exiting vmx-monitor-exit -
pause_exiting vmx-pause-exit -
activate_secondary_controls vmx-secondary-ctls -
""",
    c.SecondaryControls: """
virtualize_apic_accesses vmx-apicv-xapic vapic
enable_ept vmx-ept ept
descriptor_table_exiting vmx-desc-exit -
enable_rdtscp vmx-rdtscp-exit -
virtualize_x2apic_mode vmx-apicv-x2apic -
enable_vpid vmx-vpid vpid
wbinvd_exiting vmx-wbinvd-exit -
unrestricted_guest vmx-unrestricted-guest unrestricted_guest
apic_register_virtualization vmx-apicv-register vapic_reg
virtual_interrupt_delivery vmx-apicv-vid vid
pause_loop_exiting vmx-ple ple
rdrand_exiting vmx-rdrand-exit -
enable_invpcid vmx-invpcid-exit -
enable_vm_functions vmx-vmfunc -
vmcs_shadowing vmx-shadow-vmcs shadow_vmcs
enable_encls_exiting vmx-encls-exit -
rdseed_exiting vmx-rdseed-exit -
enable_pml vmx-pml pml
ept_violation_ve - ept_violation_ve
enable_xsaves vmx-xsaves -
mode_based_execute_control - ept_mode_based_exec
use_tsc_scaling vmx-tsc-scaling tsc_scaling
enable_user_wait_and_pause vmx-enable-user-wait-pause usr_wait_pause
instruction_timeout - notify_vm_exiting
""",
    c.TertiaryControls: """
ipi_virtualization - ipi_virt
""",
    c.VmFunctionControls: """
eptp_switching vmx-eptp-switching -
""",
    c.ExitControls: """
save_debug_controls vmx-exit-nosave-debugctl -
load_perf_global_ctrl vmx-exit-load-perf-global-ctrl -
acknowledge_interrupt vmx-exit-ack-intr -
save_pat vmx-exit-save-pat -
load_pat vmx-exit-load-pat -
save_efer vmx-exit-save-efer -
load_efer vmx-exit-load-efer -
save_preemption_timer vmx-exit-save-preemption-timer -
clear_bndcfgs vmx-exit-clear-bndcfgs -
clear_rtit_ctl vmx-exit-clear-rtit-ctl -
load_cet_state vmx-exit-save-cet -
load_pkrs vmx-exit-load-pkrs -
activate_secondary_controls vmx-exit-secondary-ctls -
""",
    c.SecondaryExitControls: "",
    c.EntryControls: """
load_debug_controls vmx-entry-noload-debugctl -
ia32e_mode_guest vmx-entry-ia32e-mode -
load_perf_global_ctrl vmx-entry-load-perf-global-ctrl -
load_pat vmx-entry-load-pat -
load_efer vmx-entry-load-efer -
load_bndcfgs vmx-entry-load-bndcfgs -
load_rtit_ctl vmx-entry-load-rtit-ctl -
load_cet_state vmx-entry-load-cet -
load_pkrs vmx-entry-load-pkrs -
load_fred vmx-entry-load-fred -
""",
    VmxBasic: """
ins_outs_information vmx-ins-outs -
true_controls vmx-true-ctls -
exceptions_without_error_code vmx-any-errcode -
nested_exception vmx-nested-exception -
""",
    VmxMisc: """
exit_stores_efer_lma vmx-store-lma -
activity_hlt vmx-activity-hlt -
activity_shutdown vmx-activity-shutdown -
activity_wait_for_sipi vmx-activity-wait-sipi -
vmwrite_any_field vmx-vmwrite-vmexit-fields -
inject_zero_length vmx-zero-len-inject -
""",
    EptVpidCapability: """
execute_only vmx-ept-execonly ept_x_only
walk_length_4 vmx-page-walk-4 -
walk_length_5 vmx-page-walk-5 ept_5level
page_2m vmx-ept-2mb -
page_1g vmx-ept-1gb ept_1gb
invept vmx-invept -
accessed_dirty vmx-eptad ept_ad
advanced_exit_information vmx-ept-advanced-exitinfo -
invept_single_context vmx-invept-single-context -
invept_all_context vmx-invept-all-context -
invvpid vmx-invvpid invvpid
invvpid_individual_address vmx-invvpid-single-addr -
invvpid_single_context vmx-invept-single-context -
invvpid_all_context vmx-invvpid-all-context -
invvpid_retaining_globals vmx-invept-single-context-noglobals -
""",
}
# QEMU calls bits 41 and 43 of IA32_VMX_EPT_VPID_CAP, which are about INVVPID, by names with INVEPT.

_REPORTS: tuple[tuple[str, int, type[Register]], ...] = (
    ("Basic VMX information", VmxMsr.IA32_VMX_BASIC, VmxBasic),
    ("Miscellaneous data", VmxMsr.IA32_VMX_MISC, VmxMisc),
    ("VPID and EPT capabilities", VmxMsr.IA32_VMX_EPT_VPID_CAP, EptVpidCapability),
)

# SvmFeatures' names -> QEMU's and /proc/cpuinfo's.
_SVM = """
np npt npt
lbr_virt lbrv lbrv
svml svm-lock svm_lock
nrips nrip-save nrip_save
tsc_rate_msr tsc-scale tsc_scale
vmcb_clean vmcb-clean vmcb_clean
flush_by_asid flushbyasid flushbyasid
decode_assists decodeassists decodeassists
pause_filter pause-filter pausefilter
pause_filter_threshold pfthreshold pfthreshold
avic avic avic
vmsave_virt v-vmsave-vmload v_vmsave_vmload
vgif vgif vgif
x2avic - x2avic
spec_ctrl v-spec-ctrl v_spec_ctrl
vnmi vnmi vnmi
nested_virt_vmcb_addr_chk svme-addr-chk -
bus_lock_threshold - bus_lock_threshold
idle_hlt_intercept - idle_hlt
"""


def _names(table: str, layout: type[Register]) -> dict[str, tuple[str, str]]:
    rows = {}
    for line in filter(None, table.splitlines()):
        name, qemu, cpuinfo = line.split()
        if name not in layout.FIELDS:
            raise TypeError(f"{layout.__name__} has no {name}")
        rows[name] = (qemu.replace("-", "", qemu == "-"), cpuinfo.replace("-", "", cpuinfo == "-"))
    return rows


def _features() -> Iterator[Feature]:
    for group, msr, layout in _REPORTS[:1]:
        yield from _reported(group, msr, layout)
    for field, group in GROUPS.items():
        word = CONTROL_WORDS[field]
        names = _names(_TABLE[word.layout], word.layout)
        for name, bits in word.layout.FIELDS.items():
            yield Feature(group, word.msr, bits, bits.about, *names.get(name, ("", "")), word)
    for group, msr, layout in _REPORTS[1:]:
        yield from _reported(group, msr, layout)


def _reported(group: str, msr: int, layout: type[Register]) -> Iterator[Feature]:
    names = _names(_TABLE[layout], layout)
    for name, bits in layout.FIELDS.items():
        yield Feature(group, msr, bits, bits.about, *names.get(name, ("", "")))


VMX_FEATURES: tuple[Feature, ...] = tuple(_features())
"""Every named bit of the VMX capability MSRs, in the order in which they are shown."""


def _svm_features() -> Iterator[Feature]:
    names = _names(_SVM, SvmFeatures)
    for name, bits in SvmFeatures.FIELDS.items():
        yield Feature(
            "CPUID Fn8000_000A_EDX", 3, bits, bits.about or name, *names.get(name, ("", ""))
        )
    for name, bits in SvmFeatures2.FIELDS.items():
        yield Feature("CPUID Fn8000_000A_ECX", 2, bits, bits.about or name)


SVM_FEATURES: tuple[Feature, ...] = tuple(_svm_features())
"""Every named bit of the SVM leaf; `msr` is the register's number, EAX first."""


def control_capability(word: ControlWord, msrs: Mapping[int, int]) -> ControlCapability | None:
    """What may and must be 1: from the TRUE MSR where it is known; None where nothing is."""
    value = msrs.get(word.true_msr) if word.true_msr is not None else None
    if value is None:
        value = msrs.get(word.msr)
    return None if value is None else ControlCapability.from_msr(value, flexible=word.flexible)


def setting(feature: Feature, msrs: Mapping[int, int]) -> Setting:
    """What a processor with these MSRs says of a feature."""
    if feature.word is not None:
        return _control_setting(feature, feature.word, msrs)
    value = msrs.get(feature.msr)
    if value is None:
        return Setting.UNKNOWN
    return Setting.YES if value & feature.bits.mask else Setting.NO


def _control_setting(feature: Feature, word: ControlWord, msrs: Mapping[int, int]) -> Setting:
    capability = control_capability(word, msrs)
    if capability is None:
        return Setting.UNKNOWN
    bit = feature.bits.mask
    if not capability.may_be_one & bit:
        return Setting.NO
    if capability.must_be_one & bit:
        return Setting.FORCED
    # Default1: old software has to treat it as forced, because the plain MSR says so.
    return Setting.DEFAULT if word.default1 & bit else Setting.ALLOWED


def number_of(feature: Feature, msrs: Mapping[int, int]) -> int | None:
    """The value of a feature that is a number."""
    value = msrs.get(feature.msr)
    return None if value is None else (value & feature.bits.mask) >> feature.bits.lsb


def offered(feature: Feature, msrs: Mapping[int, int]) -> bool | None:
    """Whether QEMU's feature of this bit is on; None where that is unknown.

    Of a default1 control QEMU's feature is the freedom to make it 0.
    """
    found = setting(feature, msrs)
    if found is Setting.UNKNOWN:
        return None
    if feature.qemu_frees:
        return found is Setting.DEFAULT
    return found.usable
