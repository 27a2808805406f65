"""States in the formats that kernels and VMMs print; the dumps of the corpus are made with these.

`python tests/explain/explain_writers.py` writes tests/explain/dumps again.
"""

import json
import sys
from pathlib import Path

from undervisor.arch.svm.vmcb import Vmcb
from undervisor.arch.svm.vmcb import VmcbField as V
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.vmx.fields import guest_segment
from undervisor.explain import vmcs12

DUMPS = Path(__file__).parent / "dumps"
ORDER = ("CS", "DS", "SS", "ES", "FS", "GS", "GDTR", "LDTR", "IDTR", "TR")
PARTS = ("SELECTOR", "ACCESS_RIGHTS", "LIMIT", "BASE")

# --- States ---------------------------------------------------------------------------------------

PAT = 0x0407_0506_0007_0106


def linux_guest():
    """A 64-bit Linux guest at CPL 0 as KVM runs it, on a 64-bit host."""
    state = dict.fromkeys((int(f) for f in F), 0)
    flat = {"SELECTOR": 0x18, "ACCESS_RIGHTS": 0xC093, "LIMIT": 0xFFFF_FFFF, "BASE": 0}
    for register in ("SS", "DS", "ES", "FS", "GS"):
        for part, value in flat.items():
            state[guest_segment(register, part)] = value
    for register in ("DS", "ES", "FS"):
        state[guest_segment(register, "SELECTOR")] = 0
        state[guest_segment(register, "ACCESS_RIGHTS")] = 0x1C000
    state |= {
        F.GUEST_GS_SELECTOR: 0,
        F.GUEST_GS_ACCESS_RIGHTS: 0x1C000,
        F.GUEST_GS_BASE: 0xFFFF_8880_7DC0_0000,
        F.GUEST_CS_SELECTOR: 0x10,
        F.GUEST_CS_ACCESS_RIGHTS: 0xA09B,
        F.GUEST_CS_LIMIT: 0xFFFF_FFFF,
        F.GUEST_LDTR_ACCESS_RIGHTS: 0x1C000,
        F.GUEST_LDTR_LIMIT: 0xFFFF_FFFF,
        F.GUEST_TR_SELECTOR: 0x40,
        F.GUEST_TR_ACCESS_RIGHTS: 0x8B,
        F.GUEST_TR_LIMIT: 0x206F,
        F.GUEST_TR_BASE: 0xFFFF_FE00_0000_3000,
        F.GUEST_GDTR_LIMIT: 0x7F,
        F.GUEST_GDTR_BASE: 0xFFFF_FE00_0000_1000,
        F.GUEST_IDTR_LIMIT: 0xFFF,
        F.GUEST_IDTR_BASE: 0xFFFF_FE00_0000_0000,
        F.GUEST_CR0: 0x8005_0033,
        F.CR0_READ_SHADOW: 0x8005_0033,
        F.CR0_GUEST_HOST_MASK: 0xFFFF_FFFF_FFFF_FFF7,
        F.GUEST_CR3: 0x0000_0000_0260_A000,
        F.GUEST_CR4: 0x37_26F0,
        F.CR4_READ_SHADOW: 0x37_06F0,
        F.CR4_GUEST_HOST_MASK: 0xFFFF_FFFF_FFFE_F871,
        F.GUEST_RSP: 0xFFFF_C900_0000_3F28,
        F.GUEST_RIP: 0xFFFF_FFFF_8106_2AD6,
        F.GUEST_RFLAGS: 0x246,
        F.GUEST_DR7: 0x400,
        F.GUEST_SYSENTER_CS: 0x10,
        F.GUEST_SYSENTER_ESP: 0xFFFF_FE00_0000_2200,
        F.GUEST_SYSENTER_EIP: 0xFFFF_FFFF_81A0_1510,
        F.GUEST_EFER: 0xD01,
        F.GUEST_PAT: PAT,
        F.VMCS_LINK_POINTER: (1 << 64) - 1,
        F.HOST_RIP: 0xFFFF_FFFF_C0A5_2F60,
        F.HOST_RSP: 0xFFFF_A6A1_409B_7D08,
        F.HOST_CS_SELECTOR: 0x10,
        F.HOST_SS_SELECTOR: 0x18,
        F.HOST_TR_SELECTOR: 0x40,
        F.HOST_FS_BASE: 0x7F3D_7A7F_C700,
        F.HOST_GS_BASE: 0xFFFF_9D3C_DEC0_0000,
        F.HOST_TR_BASE: 0xFFFF_FE58_C8A2_0000,
        F.HOST_GDTR_BASE: 0xFFFF_FE58_C8A1_E000,
        F.HOST_IDTR_BASE: 0xFFFF_FE00_0000_0000,
        F.HOST_CR0: 0x8005_0033,
        F.HOST_CR3: 0x0000_0001_0D2E_2004,
        F.HOST_CR4: 0x0037_26E0,
        F.HOST_SYSENTER_CS: 0x10,
        F.HOST_SYSENTER_ESP: 0xFFFF_FE58_C8A2_0000,
        F.HOST_SYSENTER_EIP: 0xFFFF_FFFF_A440_1720,
        F.HOST_EFER: 0xD01,
        F.HOST_PAT: PAT,
        F.PIN_BASED_CONTROLS: 0x0000_003F,
        F.PRIMARY_CONTROLS: 0xB5A0_6DFA,
        F.SECONDARY_CONTROLS: 0x0000_00AA,
        F.ENTRY_CONTROLS: 0x0000_D3FF,
        F.EXIT_CONTROLS: 0x002F_EFFF,
        F.EXCEPTION_BITMAP: 0x0006_0042,
        F.VIRTUAL_APIC_ADDRESS: 0x1_1C3C_A000,
        F.TSC_OFFSET: 0xFFFF_F6A8_46D5_3E2C,
        F.EPT_POINTER: 0x1_1FC7_A05E,
        F.VPID: 1,
        F.EXIT_REASON: 0x8000_0021,
    }
    return {int(field): value for field, value in state.items()}


def real_mode_guest():
    """An unrestricted guest at its reset vector."""
    state = linux_guest()
    for register in ("CS", "SS", "DS", "ES", "FS", "GS"):
        values = (0xF000, 0x9B, 0xFFFF, 0xF_0000) if register == "CS" else (0, 0x93, 0xFFFF, 0)
        for part, value in zip(PARTS, values, strict=True):
            state[guest_segment(register, part)] = value
    return state | {
        F.GUEST_CR0: 0x30,
        F.CR0_READ_SHADOW: 0x6000_0010,
        F.GUEST_CR3: 0,
        F.GUEST_CR4: 0x2000,
        F.CR4_READ_SHADOW: 0,
        F.GUEST_EFER: 0,
        F.ENTRY_CONTROLS: 0xD1FF,
        F.GUEST_RFLAGS: 2,
        F.GUEST_RIP: 0xFFF0,
        F.GUEST_RSP: 0,
        F.GUEST_TR_SELECTOR: 0,
        F.GUEST_TR_LIMIT: 0xFFFF,
        F.GUEST_TR_BASE: 0,
        F.GUEST_LDTR_ACCESS_RIGHTS: 0x82,
        F.GUEST_LDTR_LIMIT: 0xFFFF,
        F.GUEST_GDTR_BASE: 0,
        F.GUEST_GDTR_LIMIT: 0xFFFF,
        F.GUEST_IDTR_BASE: 0,
        F.GUEST_IDTR_LIMIT: 0xFFFF,
        F.GUEST_SYSENTER_CS: 0,
        F.GUEST_SYSENTER_ESP: 0,
        F.GUEST_SYSENTER_EIP: 0,
    }


def svm_guest():
    """A 64-bit Linux guest under nested paging, as KVM runs it, in a VMCB."""
    vmcb = Vmcb(bytearray(4096))
    vmcb.intercept_cr_read, vmcb.intercept_cr_write = 0x10, 0x110
    vmcb.intercept_dr_read, vmcb.intercept_dr_write = 0xFF, 0xFF
    vmcb.intercept_exceptions = 0x0006_0042
    vmcb.intercept_word3, vmcb.intercept_word4 = 0xBC4C_8027, 0x0000_224F
    vmcb.pause_filter_count, vmcb.pause_filter_threshold = 3000, 128
    vmcb.iopm_base_pa, vmcb.msrpm_base_pa = 0x1_0123_4000, 0x1_0246_0000
    vmcb.tsc_offset = 0xFFFF_FFEC_94C3_1E5F
    vmcb.guest_asid, vmcb.tlb_control = 5, 0
    vmcb.v_intr_control = 0x0100_0200
    vmcb.exitcode = (1 << 64) - 1
    vmcb.nested_control, vmcb.n_cr3 = 1, 0x1_0B5A_6000
    vmcb.avic_apic_bar = 0xFEE0_0000_000F_FFFF & ~0xFFF
    vmcb.efer = 0x1D01
    vmcb.cr0, vmcb.cr3, vmcb.cr4 = 0x8005_0033, 0x0261_0000, 0x0000_06F0
    vmcb.dr6, vmcb.dr7 = 0xFFFF_0FF0, 0x400
    vmcb.rip, vmcb.rflags = 0xFFFF_FFFF_8106_2AD6, 0x246
    vmcb.rsp = 0xFFFF_C900_0000_3F28
    vmcb.g_pat = 0x0007_0406_0007_0406
    vmcb.star, vmcb.lstar = 0x0023_0010_0000_0000, 0xFFFF_FFFF_81A0_0000
    vmcb.cstar, vmcb.sfmask = 0xFFFF_FFFF_81A0_1680, 0x4_7700
    vmcb.sysenter_cs = 0x10
    for name in ("es", "ds", "fs", "gs"):
        setattr(vmcb, f"{name}_limit", 0xFFFF_FFFF)
    vmcb.cs_selector, vmcb.cs_attributes, vmcb.cs_limit = 0x10, 0x29B, 0xFFFF_FFFF
    vmcb.ss_selector, vmcb.ss_attributes, vmcb.ss_limit = 0x18, 0xC93, 0xFFFF_FFFF
    vmcb.gdtr_limit, vmcb.gdtr_base = 0x7F, 0xFFFF_FE00_0000_1000
    vmcb.idtr_limit, vmcb.idtr_base = 0xFFF, 0xFFFF_FE00_0000_0000
    vmcb.tr_selector, vmcb.tr_attributes, vmcb.tr_limit = 0x40, 0x8B, 0x206F
    vmcb.tr_base = 0xFFFF_FE00_0000_3000
    return {int(field): vmcb[field] for field in V}


def vmcb_bytes(state):
    vmcb = Vmcb(bytearray(4096))
    for field, value in state.items():
        vmcb[V._value2member_map_[field]] = value
    return bytes(vmcb.b)


# --- Linux VMX ------------------------------------------------------------------------------------


def kvm_vmcs(s, version=6):
    """dump_vmcs() of Linux 4.x (4), of 5.x (5) and of 6.x (6)."""
    lines = []
    if version >= 5:
        lines.append("VMCS 000000004c3b2b7e, last attempted VM-entry on CPU 3")
    lines += [
        "*** Guest State ***",
        _cr("CR0", s, 0),
        _cr("CR4", s, 4),
        f"CR3 = 0x{s[F.GUEST_CR3]:016x}",
    ]
    if s[F.GUEST_CR4] & 0x20 and s[F.SECONDARY_CONTROLS] & 2 and not s[F.GUEST_EFER] & 0x400:
        for n in (0, 2):
            a, b = s[F[f"GUEST_PDPTE{n}"]], s[F[f"GUEST_PDPTE{n + 1}"]]
            lines.append(f"PDPTR{n} = 0x{a:016x}  PDPTR{n + 1} = 0x{b:016x}")
    lines += [
        f"RSP = 0x{s[F.GUEST_RSP]:016x}  RIP = 0x{s[F.GUEST_RIP]:016x}",
        f"RFLAGS=0x{s[F.GUEST_RFLAGS]:08x}         DR7 = 0x{s[F.GUEST_DR7]:016x}",
        f"Sysenter RSP={s[F.GUEST_SYSENTER_ESP]:016x} "
        f"CS:RIP={s[F.GUEST_SYSENTER_CS]:04x}:{s[F.GUEST_SYSENTER_EIP]:016x}",
    ]
    for register in ORDER:
        lines.append(_kvm_segment(s, register))
    pat = f"0x{s[F.GUEST_PAT]:016x}"
    if version >= 6:
        lines += [f"EFER= 0x{s[F.GUEST_EFER]:016x}", f"PAT = {pat}"]
    else:
        lines.append(f"EFER =     0x{s[F.GUEST_EFER]:016x}  PAT = {pat}")
    lines += [
        f"DebugCtl = 0x{s[F.GUEST_DEBUGCTL]:016x}  "
        f"DebugExceptions = 0x{s[F.GUEST_PENDING_DEBUG_EXCEPTIONS]:016x}",
        f"Interruptibility = {s[F.GUEST_INTERRUPTIBILITY_STATE]:08x}  "
        f"ActivityState = {s[F.GUEST_ACTIVITY_STATE]:08x}",
    ]
    if s[F.SECONDARY_CONTROLS] & 0x200:
        lines.append(f"InterruptStatus = {s[F.GUEST_INTERRUPT_STATUS]:04x}")
    return lines + _host(s) + _controls(s, version)


def _cr(name, s, n):
    actual, shadow = s[F[f"GUEST_CR{n}"]], s[F[f"CR{n}_READ_SHADOW"]]
    mask = s[F[f"CR{n}_GUEST_HOST_MASK"]]
    return f"{name}: actual=0x{actual:016x}, shadow=0x{shadow:016x}, gh_mask={mask:016x}"


def _kvm_segment(s, register):
    label = f"{register}:".ljust(5)
    if register in ("GDTR", "IDTR"):
        limit, base = s[F[f"GUEST_{register}_LIMIT"]], s[F[f"GUEST_{register}_BASE"]]
        return f"{label}                           limit=0x{limit:08x}, base=0x{base:016x}"
    sel, attr, limit, base = (s[guest_segment(register, part)] for part in PARTS)
    return f"{label} sel=0x{sel:04x}, attr=0x{attr:05x}, limit=0x{limit:08x}, base=0x{base:016x}"


def _host(s):
    selectors = " ".join(
        f"{r}={s[F[f'HOST_{r}_SELECTOR']]:04x}" for r in ("CS", "SS", "DS", "ES", "FS", "GS", "TR")
    )
    return [
        "*** Host State ***",
        f"RIP = 0x{s[F.HOST_RIP]:016x}  RSP = 0x{s[F.HOST_RSP]:016x}",
        selectors,
        f"FSBase={s[F.HOST_FS_BASE]:016x} GSBase={s[F.HOST_GS_BASE]:016x} "
        f"TRBase={s[F.HOST_TR_BASE]:016x}",
        f"GDTBase={s[F.HOST_GDTR_BASE]:016x} IDTBase={s[F.HOST_IDTR_BASE]:016x}",
        f"CR0={s[F.HOST_CR0]:016x} CR3={s[F.HOST_CR3]:016x} CR4={s[F.HOST_CR4]:016x}",
        f"Sysenter RSP={s[F.HOST_SYSENTER_ESP]:016x} "
        f"CS:RIP={s[F.HOST_SYSENTER_CS]:04x}:{s[F.HOST_SYSENTER_EIP]:016x}",
        f"EFER= 0x{s[F.HOST_EFER]:016x}  PAT = 0x{s[F.HOST_PAT]:016x}",
    ]


def _controls(s, version):
    pin, cpu = s[F.PIN_BASED_CONTROLS], s[F.PRIMARY_CONTROLS]
    second, entry, leave = s[F.SECONDARY_CONTROLS], s[F.ENTRY_CONTROLS], s[F.EXIT_CONTROLS]
    lines = ["*** Control State ***"]
    if version >= 6:
        third = s[F.TERTIARY_CONTROLS]
        lines += [
            f"CPUBased=0x{cpu:08x} SecondaryExec=0x{second:08x} TertiaryExec=0x{third:016x}",
            f"PinBased=0x{pin:08x} EntryControls={entry:08x} ExitControls={leave:08x}",
        ]
    else:
        lines += [
            f"PinBased={pin:08x} CPUBased={cpu:08x} SecondaryExec={second:08x}",
            f"EntryControls={entry:08x} ExitControls={leave:08x}",
        ]
    lines += [
        f"ExceptionBitmap={s[F.EXCEPTION_BITMAP]:08x} "
        f"PFECmask={s[F.PAGE_FAULT_ERROR_CODE_MASK]:08x} "
        f"PFECmatch={s[F.PAGE_FAULT_ERROR_CODE_MATCH]:08x}",
        f"VMEntry: intr_info={s[F.ENTRY_INTERRUPTION_INFORMATION]:08x} "
        f"errcode={s[F.ENTRY_EXCEPTION_ERROR_CODE]:08x} ilen={s[F.ENTRY_INSTRUCTION_LENGTH]:08x}",
        f"VMExit: intr_info={s[F.EXIT_INTERRUPTION_INFORMATION]:08x} "
        f"errcode={s[F.EXIT_INTERRUPTION_ERROR_CODE]:08x} ilen={s[F.EXIT_INSTRUCTION_LENGTH]:08x}",
        f"        reason={s[F.EXIT_REASON]:08x} qualification={s[F.EXIT_QUALIFICATION]:016x}",
        f"IDTVectoring: info={s[F.IDT_VECTORING_INFORMATION]:08x} "
        f"errcode={s[F.IDT_VECTORING_ERROR_CODE]:08x}",
        f"TSC Offset = 0x{s[F.TSC_OFFSET]:016x}",
    ]
    if cpu & 1 << 21:
        if second & 0x200:
            status = s[F.GUEST_INTERRUPT_STATUS]
            lines.append(
                f"SVI|RVI = {status >> 8:02x}|{status & 0xFF:02x} "
                f"TPR Threshold = 0x{s[F.TPR_THRESHOLD]:02x}"
            )
        else:
            lines.append(f"TPR Threshold = 0x{s[F.TPR_THRESHOLD]:02x}")
        access = f"APIC-access addr = 0x{s[F.APIC_ACCESS_ADDRESS]:016x} " if second & 1 else ""
        lines.append(f"{access}virt-APIC addr = 0x{s[F.VIRTUAL_APIC_ADDRESS]:016x}")
    if pin & 0x80:
        lines.append(f"PostedIntrVec = 0x{s[F.POSTED_INTERRUPT_NOTIFICATION_VECTOR]:02x}")
    if second & 2:
        lines.append(f"EPT pointer = 0x{s[F.EPT_POINTER]:016x}")
    if second & 0x20:
        lines.append(f"Virtual processor ID = 0x{s[F.VPID]:04x}")
    return lines


def xen_vmcs(s):
    """vmcs_dump_vcpu() of Xen 4.x."""
    lines = [
        "*** Guest State ***",
        _cr("CR0", s, 0),
        _cr("CR4", s, 4),
        f"CR3 = 0x{s[F.GUEST_CR3]:016x}",
        f"RSP = 0x{s[F.GUEST_RSP]:016x} (0x{s[F.GUEST_RSP]:016x})  "
        f"RIP = 0x{s[F.GUEST_RIP]:016x} (0x{s[F.GUEST_RIP]:016x})",
        f"RFLAGS=0x{s[F.GUEST_RFLAGS]:08x} (0x{s[F.GUEST_RFLAGS]:08x})  "
        f"DR7 = 0x{s[F.GUEST_DR7]:016x}",
        f"Sysenter RSP={s[F.GUEST_SYSENTER_ESP]:016x} "
        f"CS:RIP={s[F.GUEST_SYSENTER_CS]:04x}:{s[F.GUEST_SYSENTER_EIP]:016x}",
        "       sel  attr  limit   base",
    ]
    for register in ORDER:
        label = register.rjust(4)
        if register in ("GDTR", "IDTR"):
            limit, base = s[F[f"GUEST_{register}_LIMIT"]], s[F[f"GUEST_{register}_BASE"]]
            lines.append(f"{label}:            {limit:08x} {base:016x}")
            continue
        sel, attr, limit, base = (s[guest_segment(register, part)] for part in PARTS)
        lines.append(f"{label}: {sel:04x} {attr:05x} {limit:08x} {base:016x}")
    lines += [
        f"EFER(VMCS) = 0x{s[F.GUEST_EFER]:016x}  PAT = 0x{s[F.GUEST_PAT]:016x}",
        f"PreemptionTimer = 0x{s[F.PREEMPTION_TIMER_VALUE]:08x}  "
        f"SM Base = 0x{s[F.GUEST_SMBASE]:08x}",
        f"DebugCtl = 0x{s[F.GUEST_DEBUGCTL]:016x}  "
        f"DebugExceptions = 0x{s[F.GUEST_PENDING_DEBUG_EXCEPTIONS]:016x}",
        f"Interruptibility = {s[F.GUEST_INTERRUPTIBILITY_STATE]:08x}  "
        f"ActivityState = {s[F.GUEST_ACTIVITY_STATE]:08x}",
    ]
    host = _host(s)
    host[1] = f"RIP = 0x{s[F.HOST_RIP]:016x} (vmx_asm_vmexit_handler)  RSP = 0x{s[F.HOST_RSP]:016x}"
    host[-1] = f"EFER = 0x{s[F.HOST_EFER]:016x}  PAT = 0x{s[F.HOST_PAT]:016x}"
    controls = _controls(s, 5)
    keep = [line for line in controls if not line.startswith(("TPR", "virt", "APIC", "TSC", "EPT"))]
    return [
        *lines,
        *host,
        *keep,
        f"TSC Offset = 0x{s[F.TSC_OFFSET]:016x}  TSC Multiplier = 0x{s[F.TSC_MULTIPLIER]:016x}",
        f"TPR Threshold = 0x{s[F.TPR_THRESHOLD]:02x}  PostedIntrVec = 0x00",
        f"EPT pointer = 0x{s[F.EPT_POINTER]:016x}  EPTP index = 0x0000",
    ]


HAXM = {
    "VMX_PIN_CONTROLS": F.PIN_BASED_CONTROLS,
    "VMX_PRIMARY_PROCESSOR_CONTROLS": F.PRIMARY_CONTROLS,
    "VMX_SECONDARY_PROCESSOR_CONTROLS": F.SECONDARY_CONTROLS,
    "VMX_EXCEPTION_BITMAP": F.EXCEPTION_BITMAP,
    "VMX_EXIT_CONTROLS": F.EXIT_CONTROLS,
    "VMX_EXIT_MSR_STORE_COUNT": F.EXIT_MSR_STORE_COUNT,
    "VMX_EXIT_MSR_LOAD_COUNT": F.EXIT_MSR_LOAD_COUNT,
    "VMX_ENTRY_CONTROLS": F.ENTRY_CONTROLS,
    "VMX_ENTRY_MSR_LOAD_COUNT": F.ENTRY_MSR_LOAD_COUNT,
    "VMX_ENTRY_INTERRUPT_INFO": F.ENTRY_INTERRUPTION_INFORMATION,
    "VMX_ENTRY_EXCEPTION_ERROR_CODE": F.ENTRY_EXCEPTION_ERROR_CODE,
    "VMX_ENTRY_INSTRUCTION_LENGTH": F.ENTRY_INSTRUCTION_LENGTH,
    "VMX_TPR_THRESHOLD": F.TPR_THRESHOLD,
    "VMX_CR0_MASK": F.CR0_GUEST_HOST_MASK,
    "VMX_CR4_MASK": F.CR4_GUEST_HOST_MASK,
    "VMX_CR0_READ_SHADOW": F.CR0_READ_SHADOW,
    "VMX_CR4_READ_SHADOW": F.CR4_READ_SHADOW,
    "VMX_CR3_TARGET_COUNT": F.CR3_TARGET_COUNT,
    "VMX_VPID": F.VPID,
    "VMX_IO_BITMAP_A": F.IO_BITMAP_A_ADDRESS,
    "VMX_IO_BITMAP_B": F.IO_BITMAP_B_ADDRESS,
    "VMX_MSR_BITMAP": F.MSR_BITMAP_ADDRESS,
    "VMX_TSC_OFFSET": F.TSC_OFFSET,
    "VMX_VAPIC_PAGE": F.VIRTUAL_APIC_ADDRESS,
    "VMX_EPTP": F.EPT_POINTER,
    "VMX_INSTRUCTION_ERROR_CODE": F.VM_INSTRUCTION_ERROR,
    "VM_EXIT_INFO_REASON": F.EXIT_REASON,
    "VM_EXIT_INFO_QUALIFICATION": F.EXIT_QUALIFICATION,
    **{f"HOST_{n}": F[f"HOST_{n}"] for n in ("RIP", "RSP", "CR0", "CR3", "CR4")},
    **{
        f"HOST_{r}_SELECTOR": F[f"HOST_{r}_SELECTOR"]
        for r in ("CS", "DS", "ES", "FS", "GS", "SS", "TR")
    },
    **{f"HOST_{r}_BASE": F[f"HOST_{r}_BASE"] for r in ("FS", "GS", "TR", "GDTR", "IDTR")},
    **{f"HOST_SYSENTER_{p}": F[f"HOST_SYSENTER_{p}"] for p in ("CS", "ESP", "EIP")},
    **{f"GUEST_{n}": F[f"GUEST_{n}"] for n in ("RIP", "RFLAGS", "RSP", "CR0", "CR3", "CR4")},
    **{
        f"GUEST_{r}_{short}": guest_segment(r, part)
        for short, part in (
            ("SELECTOR", "SELECTOR"),
            ("AR", "ACCESS_RIGHTS"),
            ("BASE", "BASE"),
            ("LIMIT", "LIMIT"),
        )
        for r in ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")
    },
    **{f"GUEST_{r}_{p}": F[f"GUEST_{r}_{p}"] for r in ("GDTR", "IDTR") for p in ("BASE", "LIMIT")},
    "GUEST_VMCS_LINK_PTR": F.VMCS_LINK_POINTER,
    "GUEST_DEBUGCTL": F.GUEST_DEBUGCTL,
    "GUEST_PAT": F.GUEST_PAT,
    "GUEST_EFER": F.GUEST_EFER,
    "GUEST_DR7": F.GUEST_DR7,
    "GUEST_PENDING_DBE": F.GUEST_PENDING_DEBUG_EXCEPTIONS,
    **{f"GUEST_SYSENTER_{p}": F[f"GUEST_SYSENTER_{p}"] for p in ("CS", "ESP", "EIP")},
    "GUEST_INTERRUPTIBILITY": F.GUEST_INTERRUPTIBILITY_STATE,
    "GUEST_ACTIVITY_STATE": F.GUEST_ACTIVITY_STATE,
}


def haxm(s):
    """HAXM's dump_vmcs()."""
    return [f"{int(field):04x} {name}: {s[field]:x}" for name, field in HAXM.items()]


# --- Linux SVM ------------------------------------------------------------------------------------


def kvm_vmcb(s, version=6):
    """dump_vmcb() of Linux 4.x and 5.x (5: no vmsa, 64-bit intercepts) and of 6.x (6)."""

    def row(name, text):
        return f"{name:<20}{text}"

    both = s[V.INTERCEPT_WORD4] << 32 | s[V.INTERCEPT_WORD3]
    lines = []
    if version >= 6:
        lines.append("VMCB 00000000f2d1e3ac, last attempted VMRUN on CPU 11")
    lines += [
        "VMCB Control Area:",
        row("cr_read:", f"{s[V.INTERCEPT_CR_READ]:04x}"),
        row("cr_write:", f"{s[V.INTERCEPT_CR_WRITE]:04x}"),
        row("dr_read:", f"{s[V.INTERCEPT_DR_READ]:04x}"),
        row("dr_write:", f"{s[V.INTERCEPT_DR_WRITE]:04x}"),
        row("exceptions:", f"{s[V.INTERCEPT_EXCEPTIONS]:08x}"),
        row(
            "intercepts:",
            f"{s[V.INTERCEPT_WORD3]:08x} {s[V.INTERCEPT_WORD4]:08x}"
            if version >= 6
            else f"{both:016x}",
        ),
        row("pause filter count:", s[V.PAUSE_FILTER_COUNT]),
        row("pause filter threshold:", s[V.PAUSE_FILTER_THRESHOLD]),
        row("iopm_base_pa:", f"{s[V.IOPM_BASE_PA]:016x}"),
        row("msrpm_base_pa:", f"{s[V.MSRPM_BASE_PA]:016x}"),
        row("tsc_offset:", f"{s[V.TSC_OFFSET]:016x}"),
        row("asid:", s[V.GUEST_ASID]),
        row("tlb_ctl:", s[V.TLB_CONTROL]),
        row("int_ctl:", f"{s[V.V_INTR_CONTROL]:08x}"),
        row("int_vector:", f"{s[V.V_INTR_VECTOR]:08x}"),
        row("int_state:", f"{s[V.INTERRUPT_SHADOW]:08x}"),
        row("exit_code:", f"{s[V.EXITCODE] & 0xFFFF_FFFF:08x}"),
        row("exit_info1:", f"{s[V.EXITINFO1]:016x}"),
        row("exit_info2:", f"{s[V.EXITINFO2]:016x}"),
        row("exit_int_info:", f"{s[V.EXITINTINFO] & 0xFFFF_FFFF:08x}"),
        row("exit_int_info_err:", f"{s[V.EXITINTINFO] >> 32:08x}"),
        row("nested_ctl:", s[V.NESTED_CONTROL]),
        row("nested_cr3:", f"{s[V.N_CR3]:016x}"),
        row("avic_vapic_bar:", f"{s[V.AVIC_APIC_BAR]:016x}"),
        row("event_inj:", f"{s[V.EVENTINJ] & 0xFFFF_FFFF:08x}"),
        row("event_inj_err:", f"{s[V.EVENTINJ] >> 32:08x}"),
        row("virt_ext:", s[V.LBR_CONTROL]),
        row("next_rip:", f"{s[V.NRIP]:016x}"),
        row("avic_backing_page:", f"{s[V.AVIC_BACKING_PAGE]:016x}"),
        row("avic_logical_id:", f"{s[V.AVIC_LOGICAL_TABLE]:016x}"),
        row("avic_physical_id:", f"{s[V.AVIC_PHYSICAL_TABLE]:016x}"),
    ]
    if version >= 6:
        lines.append(row("vmsa_pa:", f"{s[V.VMSA_POINTER]:016x}"))
    lines.append("VMCB State Save Area:")
    for name in ("es", "cs", "ss", "ds", "fs", "gs", "gdtr", "ldtr", "idtr", "tr"):
        sel, attr, limit, base = (
            s[V[f"{name.upper()}_{part}"]] for part in ("SELECTOR", "ATTRIBUTES", "LIMIT", "BASE")
        )
        lines.append(f"{name + ':':<5} s: {sel:04x} a: {attr:04x} l: {limit:08x} b: {base:016x}")
    start = "vmpl: 0   cpl:  " if version >= 6 else "cpl:            "
    lines.append(f"{start}{s[V.CPL]}               efer:          {s[V.EFER]:016x}")
    for a, b in (
        ("cr0 CR0", "cr2 CR2"),
        ("cr3 CR3", "cr4 CR4"),
        ("dr6 DR6", "dr7 DR7"),
        ("rip RIP", "rflags RFLAGS"),
        ("rsp RSP", "rax RAX"),
        ("star STAR", "lstar LSTAR"),
        ("cstar CSTAR", "sfmask SFMASK"),
        ("kernel_gs_base KERNEL_GS_BASE", "sysenter_cs SYSENTER_CS"),
        ("sysenter_esp SYSENTER_ESP", "sysenter_eip SYSENTER_EIP"),
        ("gpat G_PAT", "dbgctl DBGCTL"),
        ("br_from BR_FROM", "br_to BR_TO"),
        ("excp_from LAST_EXCP_FROM", "excp_to LAST_EXCP_TO"),
    ):
        (left, one), (right, two) = a.split(), b.split()
        lines.append(f"{left + ':':<15} {s[V[one]]:016x} {right + ':':<13} {s[V[two]]:016x}")
    return lines


# --- QEMU -----------------------------------------------------------------------------------------


def qemu(
    head, *, rip, cs, segments=None, cr0, cr4, efer=None, rflags=0x10002, smm=0, code="", cr3=0
):
    """QEMU's register dump behind `head`; segments are (selector, base, limit, flags)."""
    flat = (0, 0, 0xFFFF, 0x9300)
    segments = segments or {}
    lines = [
        *head,
        "RAX=0000000000000000 RBX=0000000000000000 RCX=0000000000000000 RDX=0000000000000000",
        "RSI=0000000000000000 RDI=0000000000000000 RBP=0000000000000000 RSP=0000000000007c00",
        "R8 =0000000000000000 R9 =0000000000000000 R10=0000000000000000 R11=0000000000000000",
        "R12=0000000000000000 R13=0000000000000000 R14=0000000000000000 R15=0000000000000000",
        f"RIP={rip:016x} RFL={rflags:08x} [-------] CPL=0 II=0 A20=1 SMM={smm} HLT=0",
    ]
    for name in ("ES", "CS", "SS", "DS", "FS", "GS"):
        sel, base, limit, flags = cs if name == "CS" else segments.get(name, flat)
        lines.append(f"{name} ={sel:04x} {base:016x} {limit:08x} {flags:08x} DPL=0 DS   [-WA]")
    for name, default in (("LDT", (0, 0, 0xFFFF, 0x8200)), ("TR", (0, 0, 0xFFFF, 0x8B00))):
        sel, base, limit, flags = segments.get(name, default)
        lines.append(f"{name:<3}={sel:04x} {base:016x} {limit:08x} {flags:08x} DPL=0 {name}")
    lines += [
        "GDT=     0000000000000000 0000ffff",
        "IDT=     0000000000000000 0000ffff",
        f"CR0={cr0:08x} CR2=0000000000000000 CR3={cr3:016x} CR4={cr4:08x}",
        "DR0=0000000000000000 DR1=0000000000000000 DR2=0000000000000000 DR3=0000000000000000 ",
        "DR6=00000000ffff0ff0 DR7=0000000000000400",
    ]
    if efer is not None:
        lines.append(f"EFER={efer:016x}")
    lines.append("Code=" + code if code else "Code=66 90 66 90 <fa> fc 31 c0 8e d8 8e c0 8e d0")
    return lines


# --- Nested state ---------------------------------------------------------------------------------


def nested_vmx(state, flags=1, vmxon=0x1000, current=0x2000, shadow=False):
    """A KVM_GET_NESTED_STATE blob of VMX; no vmcs12 where `state` is None."""
    body = b"" if state is None else vmcs12.encode(state) + vmcs12.encode({}) * shadow
    header = bytearray(128)
    header[0:2] = flags.to_bytes(2, "little")
    header[4:8] = (128 + len(body)).to_bytes(4, "little")
    header[8:16], header[16:24] = vmxon.to_bytes(8, "little"), current.to_bytes(8, "little")
    return bytes(header) + body


def nested_svm(raw, flags=0x101, vmcb=0x3000):
    """A KVM_GET_NESTED_STATE blob of SVM."""
    header = bytearray(128)
    header[0:2], header[2:4] = flags.to_bytes(2, "little"), (1).to_bytes(2, "little")
    header[4:8] = (128 + len(raw)).to_bytes(4, "little")
    header[8:16] = vmcb.to_bytes(8, "little")
    return bytes(header) + raw


# --- Prefixes -------------------------------------------------------------------------------------


def dmesg(lines, start=1234.567890, word="kvm_intel: "):
    return [f"[{start + n / 1e6:12.6f}] {word}{line}" for n, line in enumerate(lines)]


def journal(lines, host="node7", word="kvm_amd: "):
    return [f"Mar 03 11:42:0{n % 10} {host} kernel: {word}{line}" for n, line in enumerate(lines)]


def main():
    from explain_corpus import CORPUS

    DUMPS.mkdir(exist_ok=True)
    expected = {}
    for name, (content, findings) in CORPUS.items():
        raw = content if isinstance(content, bytes) else ("\n".join(content) + "\n").encode()
        (DUMPS / name).write_bytes(raw)
        expected[name] = findings
    (DUMPS / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
