"""The corpus: what each dump is made of, and what must be found in it.

A row: the text or bytes, and the findings: the format, the exit code, the broken rules (the
likeliest first), the observations, the rules that the log names.
"""

import json

from explain_writers import (
    dmesg,
    haxm,
    journal,
    kvm_vmcb,
    kvm_vmcs,
    linux_guest,
    nested_svm,
    nested_vmx,
    qemu,
    real_mode_guest,
    svm_guest,
    vmcb_bytes,
    xen_vmcs,
)

from undervisor.arch.svm.vmcb import VmcbField as V
from undervisor.arch.vmx.fields import VmcsField as F

KVM, XEN, HAXM = "Linux KVM VMCS dump (dump_invalid_vmcs)", "Xen VMCS dump", "HAXM VMCS dump"
KVM_SVM = "Linux KVM VMCB dump (dump_invalid_vmcb)"
QEMU, BOCHS, VBOX = "QEMU with KVM: register dump", "Bochs log", "VirtualBox log"
PAIRS, JSON = "field = value text", "JSON"


def found(format, *broken, code=1, observations=(), named=()):
    return {
        "format": format,
        "code": code,
        "broken": list(broken),
        "observations": list(observations),
        "named": list(named),
    }


def vmx(changes=(), base=linux_guest):
    return base() | {int(k): v for k, v in dict(changes).items()}


def svm(changes=()):
    return svm_guest() | {int(k): v for k, v in dict(changes).items()}


CODE_16 = (0x1000, 0x1_0000, 0xFFFF, 0x9B00)
FLAT_CS = (0x38, 0, 0xFFFF_FFFF, 0x00A0_9B00)
FLAT = (0x30, 0, 0xFFFF_FFFF, 0x00C0_9300)
SEGMENTS = dict.fromkeys(("ES", "SS", "DS", "FS", "GS"), FLAT)
CORPUS = {}

# --- Linux, VMX -----------------------------------------------------------------------------------

CORPUS["kvm-6-clean.txt"] = (
    dmesg(kvm_vmcs(vmx({F.EXIT_REASON: 0x30}), 6)),
    found(KVM, code=0, observations=["vmx.exit-reason-old"]),
)
CORPUS["kvm-4-cs-dpl.txt"] = (
    dmesg(kvm_vmcs(vmx({F.GUEST_CS_ACCESS_RIGHTS: 0xA0FB}), 4), word=""),
    found(KVM, "vmx.guest.cs.dpl"),
)
CORPUS["kvm-5-tr-available.txt"] = (
    kvm_vmcs(vmx({F.GUEST_TR_ACCESS_RIGHTS: 0x89}), 5),
    found(KVM, "vmx.guest.tr.type"),
)
CORPUS["kvm-6-efer-lma.txt"] = (
    journal(kvm_vmcs(vmx({F.GUEST_EFER: 0x901}), 6), word="kvm_intel: "),
    found(KVM, "vmx.guest.efer.lma", "vmx.guest.efer.lme"),
)
CORPUS["kvm-6-rip-not-canonical.txt"] = (
    dmesg(kvm_vmcs(vmx({F.GUEST_RIP: 0x1_0000_0000_0000}), 6)),
    found(KVM, "vmx.guest.rip.canonical"),
)
CORPUS["kvm-5-rflags-bit-1.txt"] = (
    ["> " + line for line in dmesg(kvm_vmcs(vmx({F.GUEST_RFLAGS: 0x244}), 5))],
    found(KVM, "vmx.guest.rflags.bit-1"),
)
CORPUS["kvm-6-sti-and-mov-ss.txt"] = (
    dmesg(kvm_vmcs(vmx({F.GUEST_INTERRUPTIBILITY_STATE: 3}), 6)),
    found(KVM, "vmx.guest.interruptibility.sti-and-mov-ss"),
)
CORPUS["kvm-4-host-tr.txt"] = (
    dmesg(kvm_vmcs(vmx({F.HOST_TR_SELECTOR: 0, F.EXIT_REASON: 0x1}), 4)),
    found(KVM, "vmx.host.tr.null", observations=["vmx.exit-reason-old"]),
)
CORPUS["kvm-6-ept-pointer.txt"] = (
    dmesg(kvm_vmcs(vmx({F.EPT_POINTER: 0x1_1FC7_A041, F.EXIT_REASON: 0xC}), 6)),
    found(
        KVM,
        "vmx.controls.eptp.memory-type",
        "vmx.controls.eptp.walk-length",
        observations=["vmx.exit-reason-old"],
    ),
)
CORPUS["kvm-6-real-mode-limit.txt"] = (
    dmesg(kvm_vmcs(vmx({F.GUEST_GS_LIMIT: 0xFFFF_FFFF}, real_mode_guest), 6)),
    found(KVM, "vmx.guest.gs.granularity-page"),
)
CORPUS["kvm-5-injection.txt"] = (
    dmesg(
        kvm_vmcs(
            vmx({F.ENTRY_INTERRUPTION_INFORMATION: 0x8000_0B0E, F.GUEST_CR0: 0x8005_0033})
            | {int(F.GUEST_RFLAGS): 0x46, int(F.ENTRY_INTERRUPTION_INFORMATION): 0x8000_00EC},
            5,
        )
    ),
    found(KVM, "vmx.guest.rflags.if"),
)
CORPUS["kvm-6-two-vcpus.txt"] = (
    dmesg(kvm_vmcs(vmx(), 6))
    + dmesg(
        kvm_vmcs(
            vmx(
                {
                    F.GUEST_LDTR_SELECTOR: 4,
                    F.GUEST_LDTR_ACCESS_RIGHTS: 0x82,
                    F.GUEST_LDTR_LIMIT: 0xFFFF,
                }
            ),
            6,
        ),
        1240.0,
    ),
    found(KVM, "vmx.guest.ldtr.ti"),
)
EFFECTIVE = [
    line + " (effective)" if line.startswith("EFER=") else line
    for line in kvm_vmcs(vmx({F.GUEST_EFER: 0, F.ENTRY_CONTROLS: 0x53FF, F.GUEST_DR7: 1 << 32}), 6)
]
CORPUS["kvm-6-efer-not-in-the-vmcs.txt"] = (
    dmesg(EFFECTIVE),
    found(KVM, "vmx.guest.dr7"),
)
CORPUS["kvm-6-cut-off.txt"] = (
    dmesg(kvm_vmcs(vmx({F.GUEST_RFLAGS: 0x244}), 6))[:14],
    found(KVM, "vmx.guest.rflags.bit-1"),
)

# --- Xen, HAXM ------------------------------------------------------------------------------------

CORPUS["xen-clean.txt"] = (
    ["(XEN) *********** VMCS Areas **************", "(XEN) ", "(XEN) >>> Domain 5 <<<"]
    + ["(XEN) " + line for line in xen_vmcs(vmx({F.EXIT_REASON: 0xC}))],
    found(XEN, code=0, observations=["vmx.exit-reason-old"]),
)
CORPUS["xen-cr4-pae.txt"] = (
    ["(XEN) " + line for line in xen_vmcs(vmx({F.GUEST_CR4: 0x37_26D0}))],
    found(XEN, "vmx.guest.ia32e.pae"),
)
CORPUS["xen-activity.txt"] = (
    ["(XEN) [2026-02-11 09:13:55] " + line for line in xen_vmcs(vmx({F.GUEST_ACTIVITY_STATE: 4}))],
    found(XEN, "vmx.guest.activity.range"),
)
CORPUS["haxm-link-pointer.txt"] = (
    haxm(vmx({F.VMCS_LINK_POINTER: 0x1234, F.EXIT_QUALIFICATION: 4, F.SECONDARY_CONTROLS: 0xAA})),
    found(HAXM, "vmx.guest.link.aligned"),
)
CORPUS["haxm-host-selectors.txt"] = (
    [
        "haxm_warning: " + line
        for line in haxm(
            vmx(
                {
                    F.HOST_DS_SELECTOR: 0x2B,
                    F.HOST_ES_SELECTOR: 0x2B,
                    F.VM_INSTRUCTION_ERROR: 8,
                    F.EXIT_REASON: 1,
                }
            )
        )
    ],
    found(HAXM, "vmx.host.ds.rpl", "vmx.host.es.rpl", observations=["vmx.exit-reason-old"]),
)

# --- Linux, SVM -----------------------------------------------------------------------------------

CORPUS["kvm-svm-5-asid.txt"] = (
    dmesg(kvm_vmcb(svm({V.GUEST_ASID: 0}), 5), word="SVM: "),
    found(KVM_SVM, "svm.asid.zero"),
)
CORPUS["kvm-svm-6-efer.txt"] = (
    journal(kvm_vmcb(svm({V.EFER: 0xD01}), 6)),
    found(KVM_SVM, "svm.efer.svme"),
)
CORPUS["kvm-svm-6-cr0-nw.txt"] = (
    dmesg(kvm_vmcb(svm({V.CR0: 0xA005_0033, V.DR7: 0xFFFF_FFFF_0000_0400}), 6), word="kvm_amd: "),
    found(KVM_SVM, "svm.cr0.nw_without_cd", "svm.dr7.high"),
)
CORPUS["kvm-svm-6-clean.txt"] = (
    kvm_vmcb(svm({V.EXITCODE: 0x7F}), 6),
    found(KVM_SVM, code=0),
)
CORPUS["vmcb-injection.bin"] = (
    vmcb_bytes(svm({V.EVENTINJ: 0x8000_0302})),
    found("raw VMCB", "svm.eventinj.vector"),
)

# --- QEMU -----------------------------------------------------------------------------------------

SLIDE = "00 " * 20 + "<ff>" + " ff" * 28
CORPUS["qemu-emulation-failure.txt"] = (
    qemu(
        ["KVM internal error. Suberror: 1", "emulation failure"],
        rip=0xB_0000,
        cs=FLAT_CS,
        segments=SEGMENTS,
        cr0=0x8001_0033,
        cr4=0x660,
        cr3=0x3FC0_1000,
        rflags=0x10096,
        code=SLIDE,
    ),
    found(QEMU, observations=["guest.rip-place", "kvm.suberror-1", "guest.code-unmapped"]),
)
CORPUS["qemu-invalid-guest-state.txt"] = (
    qemu(
        [
            "KVM: entry failed, hardware error 0x80000021",
            "",
            "If you're running a guest on an Intel machine without unrestricted mode",
        ],
        rip=0x8000,
        cs=(0x7FF0, 0x7FFB_8000, 0xFFFF_FFFF, 0x0080_9300),
        segments=dict.fromkeys(("ES", "SS", "DS", "FS", "GS"), (0, 0, 0xFFFF_FFFF, 0x0080_9300)),
        cr0=0x50032,
        cr4=0,
        efer=0,
        smm=1,
        rflags=0x12,
    ),
    found(QEMU, observations=["guest.smm"]),
)
CORPUS["qemu-real-mode-limit.txt"] = (
    qemu(
        ["KVM: entry failed, hardware error 0x80000021"],
        rip=0x9568,
        cs=CODE_16,
        segments={"GS": (0, 0, 0xFFFF_FFFF, 0x9300)},
        cr0=0x10,
        cr4=0,
        efer=0,
        rflags=0x46,
    ),
    found(QEMU, "vmx.guest.gs.granularity-page"),
)
CORPUS["qemu-hardware-error-0.txt"] = (
    qemu(
        ["KVM: entry failed, hardware error 0x0"],
        rip=0xFFF0,
        cs=(0xF000, 0xFFFF_0000, 0xFFFF, 0x9B00),
        cr0=0x6000_0010,
        cr4=0,
        efer=0,
    ),
    found(QEMU, observations=["qemu.vmfail-invalid"]),
)
CORPUS["qemu-svm-invalid.txt"] = (
    qemu(
        ["KVM: entry failed, hardware error 0xffffffff"],
        rip=0x10_0000,
        cs=FLAT_CS,
        segments=SEGMENTS,
        cr0=0x8000_0013,
        cr4=0x2A0,
        efer=0x500,
        cr3=1 << 60,
    ),
    found(QEMU, "svm.cr3.high"),
)
CORPUS["qemu-delivery-event.txt"] = (
    qemu(
        [
            "KVM internal error. Suberror: 3",
            "extra data[0]: 0x0000000080000b0e",
            "extra data[1]: 0x0000000000000031",
            "extra data[2]: 0x0000000000000083",
            "extra data[3]: 0x0000000000000ff8",
        ],
        rip=0x1000,
        cs=FLAT_CS,
        segments=SEGMENTS,
        cr0=0x8001_0033,
        cr4=0x660,
        efer=0xD00,
        code="<f4> 90 90 90 90 90",
    ),
    found(QEMU, observations=["kvm.suberror-3"]),
)

CORPUS["qemu-32-bit.txt"] = (
    [
        "KVM: entry failed, hardware error 0x80000021",
        "EAX=00000000 EBX=00000000 ECX=00000000 EDX=00000663",
        "ESI=00000000 EDI=00000000 EBP=00000000 ESP=00000000",
        "EIP=0000e05b EFL=00010002 [-------] CPL=0 II=0 A20=1 SMM=0 HLT=0",
        *(f"{r} =0000 00000000 0000ffff 00009300" for r in ("ES", "SS", "DS", "FS", "GS")),
        "CS =f000 000f0000 0000ffff 00009b00",
        "LDT=0000 00000000 0000ffff 00008200",
        "TR =0000 00000000 0000ffff 00008100",
        "GDT=     00000000 0001ffff",
        "IDT=     00000000 0000ffff",
        "CR0=60000010 CR2=00000000 CR3=00000000 CR4=00000000",
        "DR0=0000000000000000 DR1=0000000000000000 DR2=0000000000000000 DR3=0000000000000000 ",
        "DR6=00000000ffff0ff0 DR7=0000000000000400",
        "EFER=0000000000000000",
        "Code=90 90 <2e> 66 83 3e 90 6f 00 0f 85 42 ff 31 d2 8e d2 66 bc 00 70 00 00 66 ba 09 2f",
    ],
    found(QEMU, "vmx.guest.tr.type", "vmx.guest.gdtr.limit"),
)
CORPUS["qemu-with-dmesg.txt"] = (
    [
        "KVM: entry failed, hardware error 0x80000021",
        "RIP=0000000000001000 RFL=00000000 [-------] CPL=0 II=0 A20=1 SMM=0 HLT=0",
        "",
        *dmesg(kvm_vmcs(vmx({F.GUEST_RFLAGS: 0}), 6)),
    ],
    found(KVM, "vmx.guest.rflags.bit-1"),
)

# --- Bochs, VirtualBox ----------------------------------------------------------------------------

CORPUS["bochs-host-state.txt"] = (
    [
        "00014040000i[CPU0  ] VMXON is executed",
        "00014041204e[CPU0  ] VMFAIL: VMCS host SS selector 0",
    ],
    found(BOCHS, observations=["bochs.message"], named=["vmx.host.ss.null"]),
)
CORPUS["bochs-guest-segment.txt"] = (
    ["00092210385e[CPU0  ] VMENTER FAIL: VMCS guest DS.AR/LIMIT malformed"],
    found(
        BOCHS,
        observations=["bochs.message"],
        named=[
            f"vmx.guest.ds.{kind}"
            for kind in ("granularity-byte", "granularity-page", "reserved-low", "reserved-high")
        ],
    ),
)
VBOX_LINES = [
    "00:00:05.481400 !!         VCPU0: Guru Meditation -4014 (VERR_VMX_INVALID_GUEST_STATE)",
    "00:00:05.481470 eax=00000000 ebx=00000000 ecx=00000000 edx=00000000 esi=00000000 edi=00000000",
    "00:00:05.481471 eip=00009568 esp=00001000 ebp=00000000 iopl=0         nv up di pl nz na po nc",
    "00:00:05.481472 cs={9000 base=0000000000090000 limit=0000ffff flags=0000009b}",
    "00:00:05.481473 ds={0000 base=0000000000000000 limit=0000ffff flags=00000093}",
    "00:00:05.481475 gs={0000 base=0000000000000000 limit=ffffffff flags=0000c0f3} cr0=00000010",
    "00:00:05.485406 CPU[0]: VT-x info:",
    "00:00:05.485406   HM error           = 0x23a (570)",
    "00:00:05.485407   rcLastExitToR3     = VERR_VMX_INVALID_GUEST_STATE",
]
CORPUS["virtualbox-guest-state.txt"] = (
    VBOX_LINES,
    found(
        VBOX,
        observations=["virtualbox.verr_vmx_invalid_guest_state", "virtualbox.hm-error"],
        named=["vmx.guest.gs.limit-vm86"],
    ),
)
CORPUS["virtualbox-start.txt"] = (
    [
        "00:00:02.100000 HM: CPU0: Instruction error: 7 (0x7)",
        "00:00:02.100001 VERR_VMX_UNABLE_TO_START_VM",
    ],
    found(VBOX, observations=["virtualbox.verr_vmx_unable_to_start_vm"]),
)

# --- Nested state, JSON, text ---------------------------------------------------------------------

CORPUS["nested-vmx-running.bin"] = (
    nested_vmx(vmx({F.GUEST_DR7: 1 << 32, F.EXIT_REASON: 0})),
    found("KVM nested state (VMX)", "vmx.guest.dr7"),
)
CORPUS["nested-vmx-idle.bin"] = (
    nested_vmx(None, flags=0, vmxon=(1 << 64) - 1, current=(1 << 64) - 1),
    found("KVM nested state (VMX)", code=0),
)
CORPUS["nested-svm.bin"] = (
    nested_svm(vmcb_bytes(svm({V.INTERCEPT_WORD4: 0x224E, V.EXITCODE: 0x60}))),
    found("KVM nested state (SVM)", "svm.intercept.vmrun"),
)
CORPUS["ours.json"] = (
    [
        json.dumps(
            {
                "vendor": "vmx",
                "guest": {
                    "cr0": "0x80000031",
                    "cr4": "0x2020",
                    "cs": {"selector": 8, "ar": "0xa09b"},
                    "rflags": "0x0",
                },
                "entry_controls": "0x93ff",
                "host": {"cr4": "0x20"},
            },
            indent=1,
        )
    ],
    found(JSON, "vmx.host.cr4.must-be-one", "vmx.guest.rflags.bit-1"),
)
CORPUS["fields.txt"] = (
    [
        "# what my hypervisor writes before VMLAUNCH",
        "Guest RFLAGS = 0",
        "VMCS_GUEST_CR4 := 0x2020",
        "0x6C00 = 80050033h   ; HOST_CR0",
        "hostTrSelector: 0x0",
        "GUEST_IA32_DEBUGCTL=0",
    ],
    found(PAIRS, "vmx.host.tr.null", "vmx.guest.rflags.bit-1"),
)
CORPUS["fields-svm.txt"] = (
    [
        "vmcb->control.asid = 0",
        "control.intercepts_word4 = 0",
        "save.efer = 0x1500",
        "save.cr0 = 0x80000011",
        "nested_cr3 = 0x1000",
        "nested_ctl = 1",
        "asid = 0",
    ],
    found(PAIRS, "svm.asid.zero"),
)
