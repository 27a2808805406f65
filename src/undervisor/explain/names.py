"""Field names in any style: the manual's, ours, Linux's, Xen's, HAXM's, Bochs's, VirtualBox's.

A name is cut into words, the words that say nothing are dropped, the rest are brought to one
spelling; what is left, in any order, is the field's key.  So "GUEST_CS_AR_BYTES", "guest.cs.ar",
"Guest CS access rights" and "VMX_VMCS32_GUEST_CS_ACCESS_RIGHTS" are the same.
"""

from __future__ import annotations

import re
from functools import lru_cache

from undervisor.arch.svm.vmcb import VmcbField
from undervisor.arch.vmx.checks.inputs import EntryInput
from undervisor.arch.vmx.fields import VmcsField
from undervisor.arch.vmx.fields import VmcsField as F

NAME_LIMIT = 120
"""Characters of a name; no field's name in any style is longer."""

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

_SPELLING = """
ar=rights access= arbytes=rights bytes= attr=rights attrib=rights attribute=rights
attributes=rights sel=selector lim=limit addr= address= pa= page= ptr= pointer= vmcs= vmx= vm=
vmcb= ia= area= field= fields= value= val= full= reg= msr=msr register= state= info= information=
controls= control= ctls= ctrls= ctrl= ctl= cntrl= based= execution= exec= ro= bit= bits= natural=
width= save= enc= encoding=
proc=processor cpu=processor vmentry=entry vmexit=exit intr=interrupt interruption=interrupt
dbg=debug dbe=debugexception exceptions=exception exc=exception pf=fault phys=physical
eip=rip esp=rsp eflags=rflags rfl=rflags eflag=rflags gdt=gdtr idt=idtr ldt=ldtr eptp=ept
ptr=  funct=function func=function instr=instruction len=length pdptr=pdpte
errcode=errorcode err=error ext=external bmp=bitmap cap= sec=secondary prim=primary
tert=tertiary debugctlmsr=debugctl dbgctl=debugctl pat=pat perfglobal=perfglobal
smm=smm tr=tr timer=timer virt=virtual
"""
_WORDS = dict(pair.split("=") for pair in _SPELLING.split())
_NOISE_NUMBERS = frozenset({"16", "32", "64"})

Key = tuple[str, ...]


@lru_cache(maxsize=4096)
def key_of(name: str) -> Key:
    """The key of a name; empty for one without a telling word."""
    words = []
    for word in _WORD.findall(name[:NAME_LIMIT].replace("IA32", "").replace("ia32", "")):
        if word in _NOISE_NUMBERS:
            continue
        lower = word.lower()
        if lower.isdigit():
            words.append(lower.lstrip("0") or "0")
            continue
        lower = _WORDS.get(lower, lower)
        if lower:
            words.append(lower)
    return tuple(sorted(words))


# Names that differ by more than spelling; the part after the colon is any style's name.
_VMX_ALIASES = """
PRIMARY_CONTROLS: processor; primary processor; cpu based vm exec control; CPUBased
SECONDARY_CONTROLS: processor 2; secondary processor; SecondaryExec; proc exec2; exec 2
TERTIARY_CONTROLS: processor 3; tertiary processor; TertiaryExec; proc exec3
PIN_BASED_CONTROLS: PinBased
ENTRY_CONTROLS: EntryControls
EXIT_CONTROLS: primary exit; ExitControls
SECONDARY_EXIT_CONTROLS: exit 2
VM_FUNCTION_CONTROLS: vmfunc; vmfunction; vmfunction controls; vmfunc controls
VPID: virtual processor id; virtual processor identifier
IO_BITMAP_A_ADDRESS: iobitmap a; bitmap a
IO_BITMAP_B_ADDRESS: iobitmap b; bitmap b
EPT_POINTER: extended table
ENTRY_INTERRUPTION_INFORMATION: entry interrupt; entry event injection; VMEntryIntrInfo
ENTRY_EXCEPTION_ERROR_CODE: entry error code; entry interrupt error code; entry errorcode
ENTRY_INSTRUCTION_LENGTH: entry ilen
EXIT_INSTRUCTION_LENGTH: exit ilen; instruction length
EXIT_INSTRUCTION_INFORMATION: instruction; vmx instruction info
EXIT_INTERRUPTION_INFORMATION: exit interrupt
EXIT_INTERRUPTION_ERROR_CODE: exit error code; exit exception error code; exit errorcode
EXIT_REASON: reason; exit reason
EXIT_QUALIFICATION: qualification
VM_INSTRUCTION_ERROR: instruction error; vm instruction error; instruction error code
IDT_VECTORING_INFORMATION: exit idt vectoring
IDT_VECTORING_ERROR_CODE: exit idt vectoring error code
IO_RCX: exit io ecx
IO_RSI: exit io esi
IO_RDI: exit io edi
IO_RIP: exit io eip
GUEST_LINEAR_ADDRESS: exit guest linear
GUEST_PHYSICAL_ADDRESS: exit guest physical
VIRTUAL_APIC_ADDRESS: vapic; vapic page; virtual apic
APIC_ACCESS_ADDRESS: apicaccess; apic
POSTED_INTERRUPT_DESCRIPTOR_ADDRESS: posted interrupt desc; pi descriptor; pi desc
POSTED_INTERRUPT_NOTIFICATION_VECTOR: posted interrupt nv; posted interrupt vector; PostedIntrVec
CR0_GUEST_HOST_MASK: cr0 mask; cr0 gh mask
CR4_GUEST_HOST_MASK: cr4 mask; cr4 gh mask
CR0_READ_SHADOW: cr0 shadow
CR4_READ_SHADOW: cr4 shadow
CR3_TARGET_VALUE_0: cr3 target base; cr3 target val base
PAGE_FAULT_ERROR_CODE_MASK: pfec mask; PFECmask
PAGE_FAULT_ERROR_CODE_MATCH: pfec match; PFECmatch
XSS_EXITING_BITMAP: xss exit bitmap
ENCLS_EXITING_BITMAP: encls exit bitmap
EOI_EXIT_BITMAP_0: eoi exitmap 0; eoi exit 0
EOI_EXIT_BITMAP_1: eoi exitmap 1; eoi exit 1
EOI_EXIT_BITMAP_2: eoi exitmap 2; eoi exit 2
EOI_EXIT_BITMAP_3: eoi exitmap 3; eoi exit 3
VMCS_LINK_POINTER: link; vmcs link pointer; guest vmcs link pointer
GUEST_PENDING_DEBUG_EXCEPTIONS: guest pending debugexception; pending debug; guest pending debug
GUEST_INTERRUPTIBILITY_STATE: guest interruptibility; interruptibility
GUEST_ACTIVITY_STATE: activity; ActivityState
GUEST_INTERRUPT_STATUS: InterruptStatus
GUEST_DEBUGCTL: guest debug ctl; DebugCtl
GUEST_PERF_GLOBAL_CTRL: PerfGlobCtl; guest perf global
HOST_PERF_GLOBAL_CTRL: host perf global
PREEMPTION_TIMER_VALUE: guest preemption timer; preemption timer
TSC_OFFSET: tscoffset
PML_INDEX: guest pml index
PLE_GAP: pause loop exiting gap
PLE_WINDOW: pause loop exiting window
HOST_SYSENTER_CS: host sysenter cs
GUEST_BNDCFGS: guest bndcfgs; BndCfgS
GUEST_SSP: guest ssp
"""

_SVM_ALIASES = """
INTERCEPT_CR_READ: cr read; intercept cr reads; intercept read cr
INTERCEPT_CR_WRITE: cr write; intercept cr writes; intercept write cr
INTERCEPT_DR_READ: dr read; intercept dr reads; intercept read dr
INTERCEPT_DR_WRITE: dr write; intercept dr writes; intercept write dr
INTERCEPT_EXCEPTIONS: exceptions; exception intercepts; intercept exception vector
INTERCEPT_WORD3: intercept misc 1; intercept general 1; intercept misc1
INTERCEPT_WORD4: intercept misc 2; intercept general 2; intercept misc2
INTERCEPT_WORD5: intercept misc 3; intercept misc3
PAUSE_FILTER_THRESHOLD: pause filter thresh; pause filter threshold
IOPM_BASE_PA: iopm base; iopm; io permission map base
MSRPM_BASE_PA: msrpm base; msrpm; msr permission map base
GUEST_ASID: asid
TLB_CONTROL: tlb ctl; tlb
V_INTR_CONTROL: int ctl; int control; vintr; virtual interrupt control; v interrupt
V_INTR_VECTOR: int vector; v interrupt vector
INTERRUPT_SHADOW: interrupt shadow
EXITCODE: exit code; exitcode; exit reason
EXITINFO1: exit info 1; exitinfo 1
EXITINFO2: exit info 2; exitinfo 2
EXITINTINFO: exit int info; exit interrupt info; exitintinfo
NESTED_CONTROL: nested ctl; np enable; misc ctl; nested paging control
EVENTINJ: event inj; event injection; eventinj
N_CR3: nested cr3; ncr3; n cr3
LBR_CONTROL: virt ext; lbr ctl; lbr virtualization; misc ctl 2
CLEAN_BITS: clean; vmcb clean bits
NRIP: next rip; nrip
AVIC_APIC_BAR: avic vapic bar
GHCB_GPA: ghcb; ghcb gpa
AVIC_LOGICAL_TABLE: avic logical id; avic logical table
AVIC_PHYSICAL_TABLE: avic physical id; avic physical table
VMSA_POINTER: vmsa; vmsa pa
G_PAT: gpat; g pat; guest pat; pat
DBGCTL: debugctl; dbg ctl
BR_FROM: br from; lbr from
BR_TO: br to; lbr to
LAST_EXCP_FROM: excp from; last excp from
LAST_EXCP_TO: excp to; last excp to
"""


def _table(fields: list[tuple[str, int]], aliases: str, drop: str) -> dict[Key, int]:
    """Keys of all names; two fields with one key are an error of the tables above."""
    table: dict[Key, int] = {}
    numbers = dict(fields)
    for name, number in fields:
        key = key_of(name)
        if table.setdefault(key, number) != number:
            raise TypeError(f"{name}: the same key as {table[key]:#x}")
    for line in aliases.split("\n"):
        name, _, names = line.partition(":")
        for alias in filter(None, (part.strip() for part in names.split(";"))):
            key = key_of(alias)
            if table.setdefault(key, numbers[name]) != numbers[name]:
                raise TypeError(f"{alias}: the same key as {table[key]:#x}")
    for key, number in list(table.items()):
        if drop in key:
            table.setdefault(tuple(word for word in key if word != drop), number)
    return table


_VMX_FIELDS = [(f.name, int(f)) for f in VmcsField] + [(i.name, int(i)) for i in EntryInput]
_SVM_FIELDS = [(f.name, int(f)) for f in VmcbField]
VMX_NAMES = _table(_VMX_FIELDS, _VMX_ALIASES, "guest")
SVM_NAMES = _table(_SVM_FIELDS, _SVM_ALIASES, "guest")

_GUEST_KEYS = {key: number for key, number in SVM_NAMES.items() if number >= 0x400}
for _key, _number in _GUEST_KEYS.items():
    SVM_NAMES.setdefault(tuple(sorted((*_key, "guest"))), _number)

_ENCODING = re.compile(r"(?:0x([0-9a-fA-F]{1,8})|([0-9a-fA-F]{4,8})h?)\Z")


def vmx_field(name: str) -> int | None:
    """The VMCS field (or entry input) of a name or an encoding; None where there is none."""
    match = _ENCODING.match(name.strip())
    if match:
        number = int(match[1] or match[2], 16)
        try:
            return int(VmcsField(number))
        except ValueError:
            return None
    return VMX_NAMES.get(key_of(name))


def svm_field(name: str) -> int | None:
    """The VMCB field of a name; None where there is none."""
    # Linux's int_ctl and int_state differ only in words that say nothing elsewhere.
    if name.lower().endswith("int_state"):
        return int(VmcbField.INTERRUPT_SHADOW)
    return SVM_NAMES.get(key_of(name))


def is_high_half(name: str) -> int | None:
    """The 64-bit field whose high 32 bits `name` means, None for every other name."""
    match = _ENCODING.match(name.strip())
    if match:
        number = int(match[1] or match[2], 16)
        known = number & 1 and number ^ 1 in VmcsField._value2member_map_
        return number ^ 1 if known else None
    if not name.upper().rstrip("]) ").endswith("HIGH"):
        return None
    field = VMX_NAMES.get(tuple(word for word in key_of(name) if word != "high"))
    return field if field is not None and F(field).width == 1 else None
