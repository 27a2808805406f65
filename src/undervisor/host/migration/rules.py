"""The rules of migration and save/restore under nesting: data, each with its source."""

from __future__ import annotations

from enum import Enum

from undervisor.host.checks.finding import Kind, Layer, Level
from undervisor.host.facts.version import Version

_L = Layer.MIGRATION
_KERNEL_DOCUMENT = "Linux Documentation, Running nested guests with KVM, Live migration"


class Case(Enum):
    """What moves, or is saved here and restored there."""

    L1_RUNNING = ("l1-running", "an L1 with running L2 guests")
    L1_CONFIGURED = ("l1-configured", "an L1 that may nest and runs no L2")
    L2_SAME_HOST = ("l2-same-host", "an L2 to another L1 on the same host")
    L2_OTHER_HOST = ("l2-other-host", "an L2 to an L1 on another host")
    L2_BARE_METAL = ("l2-bare-metal", "an L2 to bare metal")

    def __init__(self, word: str, title: str) -> None:
        self.word = word
        self.title = title

    @property
    def of_l1(self) -> bool:
        """Whether the guest that moves is a hypervisor, so that its virtual VMX or SVM moves."""
        return self in (Case.L1_RUNNING, Case.L1_CONFIGURED)


# The first versions that save what VMRUN and VMRESUME left in the processor.
STATE_SINCE = {"vmx": Version(4, 20), "svm": Version(5, 8)}
"""Kernels with KVM_GET_NESTED_STATE and KVM_SET_NESTED_STATE for the vendor."""

DOCUMENT_SINCE = {"vmx": Version(5, 3)}
"""Kernels from which on the kernel's document calls it safe."""

QEMU_SINCE = {"vmx": Version(4, 2), "svm": Version(5, 2)}
"""QEMU versions that save the vendor's nested state in the right format."""

RESTORE_DEFECTS = {"svm": ("CVE-2026-45987", "CVE-2026-46032")}
"""Defects of saving and restoring nested state, by their CVE records."""

VENDORS_DIFFER = Kind(
    "vendors-differ", _L, Level.FAIL, "The processors are of different vendors",
    "VMX state means nothing to SVM and the reverse; even without nesting a guest keeps the CPUID "
    "of the vendor that it started on.",
    "Move it switched off, or choose a destination of the same vendor.",
    ("QEMU documentation, Recommendations for KVM CPU model configuration",),
)  # fmt: skip
VENDOR_UNKNOWN = Kind(
    "vendor-unknown", _L, Level.UNKNOWN, "The processors could not be compared",
    "The vendor or the flags of one side are not known.", "Make /proc/cpuinfo readable there.",
)  # fmt: skip
KERNEL_TOO_OLD = Kind(
    "kernel-without-nested-state", _L, Level.FAIL, "A kernel can't save nested state",
    "KVM_GET_NESTED_STATE came with 4.20 for VMX and with 5.8 for SVM. Before, QEMU refuses, or "
    "the L2 guests of the moved L1 are lost and L1 may panic.",
    "Shut the L2 guests down first, or use a newer kernel on that side.",
    (_KERNEL_DOCUMENT, "Linux commit cc440cdad5b7 (KVM: nSVM)"),
)  # fmt: skip
NUMBER_UNSURE = Kind(
    "kernel-number-unsure", _L, Level.UNKNOWN, "This kernel's number says nothing about nesting",
    "Red Hat keeps the number of a kernel for years and takes KVM from much later ones.",
    "Ask the distribution's documentation which kernel and QEMU it supports for nested migration.",
)  # fmt: skip
KERNEL_BELOW_DOCUMENT = Kind(
    "kernel-below-document", _L, Level.WARN, "The kernel's document asks for a newer kernel",
    "The interface exists since 4.20; the document calls the migration of an L1 with L2 guests "
    "working from 5.3 on, together with QEMU 4.2.",
    "Use a kernel from 5.3 on, on both sides.", (_KERNEL_DOCUMENT,),
)  # fmt: skip
QEMU_TOO_OLD = Kind(
    "qemu-too-old", _L, Level.FAIL, "A QEMU can't save nested state",
    "Older QEMU says \"Nested VMX virtualization does not support live migration yet\", or saves "
    "SVM state in VMX's format (5.1).",
    "Use QEMU 4.2 (Intel) or 5.2 (AMD) or later on both sides; or take vmx or svm from the guest's "
    "CPU model, which needs a restart of the guest.",
    (_KERNEL_DOCUMENT, "qemu-devel 2020-11, Set proper nested state format for SVM"),
)  # fmt: skip
QEMU_UNKNOWN_THERE = Kind(
    "qemu-version-unknown", _L, Level.UNKNOWN, "QEMU's version is not known on both sides",
    "Other VMMs have rules of their own: Cloud Hypervisor saves nested state since 2025-10.",
    "Install QEMU there, or ask the VMM's documentation.",
)  # fmt: skip
RESTORE_DEFECT = Kind(
    "nested-restore-defects", _L, Level.WARN, "Known defects in restoring SVM state",
    "Fixes of saving and restoring came long after 5.8: an L2 can hang after the restore "
    "(CVE-2026-45987) or a failure stays unseen (CVE-2026-46032).",
    "Use a kernel with both fixes (7.0.4, 7.1 or later; the first is also in 6.6.140, 6.12.86 and "
    "6.18.27), or shut the L2 guests down first.",
    ("https://www.cve.org/CVERecord?id=CVE-2026-45987",
     "https://www.cve.org/CVERecord?id=CVE-2026-46032"),
)  # fmt: skip
RESTORE_UNSURE = Kind(
    "nested-restore-unsure", _L, Level.UNKNOWN, "Whether the restore defects are fixed is unknown",
    "The kernel is a distribution's, which may have the fixes under an older number.",
    "Look up CVE-2026-45987 and CVE-2026-46032 in the distribution's tracker.",
)  # fmt: skip
DOCUMENT_IS_STALE = Kind(
    "document-says-unsafe", _L, Level.NOTE, "The kernel's document still calls this unsafe on AMD",
    "It says that an L1 that ran an L2 must not move until the L2 ends. That was true before 5.8 "
    "and QEMU 5.2; the text was not changed since.",
    "Test it with your own guests before you depend on it.",
    (_KERNEL_DOCUMENT, "Linux 5.8, KVM: nSVM: implement KVM_GET_NESTED_STATE",
     "QEMU commit b16c0e20c742"),
)  # fmt: skip
MAY_FAIL_LATER = Kind(
    "may-fail-once-started", _L, Level.NOTE, "It moves, but may fail once it starts guests",
    "Configured for nesting and without a running L2 there is no nested state to lose; whether L2 "
    "guests work afterwards depends on the destination.",
    "Run `undervisor check` in L1 after the move.", (_KERNEL_DOCUMENT,),
)  # fmt: skip
KERNEL_GOES_BACK = Kind(
    "kernel-goes-back", _L, Level.WARN, "The destination's kernel is older",
    "Newer kernels add fields and flags to the nested state that older ones refuse or ignore; "
    "restores from a newer to an older L0 were seen to break.",
    "Move towards the newer kernel, or update the destination first.",
    ("cloud-hypervisor/cloud-hypervisor#2535",),
)  # fmt: skip
QEMU_GOES_BACK = Kind(
    "qemu-goes-back", _L, Level.WARN, "The destination's QEMU is older",
    "A stream is only promised to be understood by the same or a newer QEMU with the same "
    "versioned machine type.",
    "Update QEMU at the destination, or start the guest with a machine type that both know.",
    ("QEMU documentation, Migration",),
)  # fmt: skip
NESTED_OFF_THERE = Kind(
    "nested-off-there", _L, Level.FAIL, "Nesting is off at the destination",
    "The guest's CPU has an extension that the destination does not give.",
    "On the destination: sudo undervisor enable.", (_KERNEL_DOCUMENT,),
)  # fmt: skip
NESTED_UNKNOWN_THERE = Kind(
    "nested-unknown-there", _L, Level.UNKNOWN, "Whether the destination nests is not known",
    "The nested parameter there could not be read.", "Run `undervisor check` there.",
)  # fmt: skip
FEATURES_MISSING = Kind(
    "features-missing-there", _L, Level.FAIL, "The destination lacks features of the source",
    "A guest with host-passthrough (and one with host-model, for the features of its model) is "
    "refused with \"guest CPU doesn't match specification: missing features\", or crashes on their "
    "use. The list uses QEMU's names and says which bit reports each.",
    "Give the guest a CPU model that both sides have: virsh hypervisor-cpu-baseline with both "
    "hosts' capabilities; disable the named features where they are not needed.",
    ("harvester/harvester#7965", "Intel SDM, VMX Capability Reporting Facility"),
)  # fmt: skip
CAPABILITIES_UNKNOWN = Kind(
    "vmx-capabilities-unknown", _L, Level.NOTE, "The VMX capability MSRs could not be compared",
    "Two processors with the same flags can still differ in VMX controls that L1 uses.",
    "Run it again as root on both sides with the msr module loaded: sudo modprobe msr.",
    ("Intel SDM, VMX Capability Reporting Facility",),
)  # fmt: skip
L2_MOVES = Kind(
    "l2-moves", _L, Level.OK, "An L2 is an ordinary guest to those who move it",
    "L1 saves and L1 restores; the levels below do not see it. What counts are the two L1s (or L1 "
    "and the bare-metal host): their processors as they see them, and their QEMU.",
    sources=(_KERNEL_DOCUMENT,),
)  # fmt: skip
Z_MOVES = Kind(
    "z-moves", _L, Level.OK, "IBM Z moves nested guests",
    "The document calls it working, on older kernels too.", sources=(_KERNEL_DOCUMENT,),
)  # fmt: skip
STATE_IS_SAVED = Kind(
    "nested-state-is-saved", _L, Level.OK, "Both sides save and restore nested state",
    "Kernel and QEMU are new enough on both sides.", sources=(_KERNEL_DOCUMENT,),
)  # fmt: skip
EXTENSION_MISSING = Kind(
    "no-extension-there", _L, Level.FAIL, "A side has no virtualization extension to nest with",
    "Neither side can hold an L1 without vmx, svm or sie.",
    "See `undervisor check` on that machine.",
)  # fmt: skip
