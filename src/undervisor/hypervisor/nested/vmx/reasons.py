"""Which exit reasons nested VMX gives to L1, and why it never gives the others."""

from __future__ import annotations

from typing import Final

from undervisor.arch.vmx.exits import ExitReason as R

_NO_FEATURE: Final = "no model offers the feature, so that the instruction is undefined"
_NO_XSS: Final = "IA32_XSS has no bit that may be 1, so that the exiting bitmap selects nothing"
_NO_SMM: Final = "there is no system-management mode"

UNSUPPORTED: Final[dict[R, str]] = {
    R.IO_SMI: _NO_SMM,
    R.OTHER_SMI: _NO_SMM,
    R.RSM: "RSM is undefined outside system-management mode, which there is not",
    R.TASK_SWITCH: "the silicon has no such intercept, and switches tasks by itself",
    R.GETSEC: _NO_FEATURE,
    R.ENTRY_FAILURE_MACHINE_CHECK: "no machine check is ever raised",
    R.ENCLS: _NO_FEATURE,
    R.XSAVES: _NO_XSS,
    R.XRSTORS: _NO_XSS,
    R.PCONFIG: _NO_FEATURE,
    R.SPP_RELATED_EVENT: "no model offers sub-page write permissions",
    R.UMWAIT: _NO_FEATURE,
    R.TPAUSE: _NO_FEATURE,
    R.LOADIWKEY: _NO_FEATURE,
    R.ENCLV: _NO_FEATURE,
    R.ENQCMD_PASID_TRANSLATION_FAILURE: _NO_FEATURE,
    R.ENQCMDS_PASID_TRANSLATION_FAILURE: _NO_FEATURE,
    R.BUS_LOCK: "no model offers bus-lock detection",
    R.INSTRUCTION_TIMEOUT: "no model offers the instruction timeout",
    R.SEAMCALL: _NO_FEATURE,
    R.TDCALL: _NO_FEATURE,
    R.RDMSRLIST: _NO_FEATURE,
    R.WRMSRLIST: _NO_FEATURE,
    R.URDMSR: _NO_FEATURE,
    R.UWRMSR: _NO_FEATURE,
    R.RDMSR_IMMEDIATE: _NO_FEATURE,
    R.WRMSR_IMMEDIATE: _NO_FEATURE,
}
"""Exit reason -> why L2 never exits with it."""

NOTHING_TO_DO: Final[dict[str, str]] = {
    "enable_vpid": "every transition drops the silicon's translations, which a VPID permits",
}
"""Controls that change nothing that a guest could see -> why."""
