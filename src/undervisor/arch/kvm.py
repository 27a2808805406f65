"""KVM's interface to user space as data: the numbers and layouts of its API, on x86.

Requests, structures, capabilities and exits as "The Definitive KVM (Kernel-based Virtual Machine)
API Documentation" (Documentation/virt/kvm/api.rst) and linux/kvm.h name them, without `KVM_`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import Final

from undervisor.arch.bits import Bits, Register

DEVICE: Final = "/dev/kvm"
API_VERSION: Final = 12
NESTED_STATE_MOST: Final = 128 + 2 * 4096
"""Bytes of the largest nested state: its header, vmcs12 and the shadow vmcs12."""


class Request(IntEnum):
    """ioctl requests: direction, size, 0xAE, number."""

    # of the device
    GET_API_VERSION = 0xAE00
    CREATE_VM = 0xAE01
    CHECK_EXTENSION = 0xAE03
    GET_VCPU_MMAP_SIZE = 0xAE04
    GET_SUPPORTED_CPUID = 0xC008AE05
    GET_MSR_FEATURE_INDEX_LIST = 0xC004AE0A
    GET_MSRS = 0xC008AE88  # of a vCPU, too
    # of a virtual machine
    CREATE_VCPU = 0xAE41
    SET_USER_MEMORY_REGION = 0x4020AE46
    SET_TSS_ADDR = 0xAE47
    SET_IDENTITY_MAP_ADDR = 0x4008AE48
    CREATE_IRQCHIP = 0xAE60
    IRQ_LINE = 0x4008AE61
    REGISTER_COALESCED_MMIO = 0x4010AE67
    CREATE_PIT2 = 0x4040AE77
    # of a vCPU
    RUN = 0xAE80
    GET_REGS = 0x8090AE81
    SET_REGS = 0x4090AE82
    GET_SREGS = 0x8138AE83
    SET_SREGS = 0x4138AE84
    SET_MSRS = 0x4008AE89
    SET_CPUID2 = 0x4008AE90
    GET_MP_STATE = 0x8004AE98
    GET_NESTED_STATE = 0xC080AEBE
    SET_NESTED_STATE = 0x4080AEBF


class Capability(IntEnum):
    """What CHECK_EXTENSION can be asked about."""

    IRQCHIP = 0
    COALESCED_MMIO = 15
    MAX_VCPUS = 66
    TSC_DEADLINE_TIMER = 72
    IMMEDIATE_EXIT = 136
    NESTED_STATE = 157
    COALESCED_PIO = 162
    X86_GUEST_MODE = 238


class Exit(IntEnum):
    """`exit_reason`: why RUN came back."""

    UNKNOWN = 0
    IO = 2
    HLT = 5
    MMIO = 6
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24


class RunFlags(Register):
    """`flags` of the shared page. "The kvm_run structure"."""

    WIDTH = 16
    smm = Bits(0, about="X86_SMM: the vCPU is in system management mode")
    bus_lock = Bits(1, about="X86_BUS_LOCK: a bus lock was detected")
    guest_mode = Bits(2, about="X86_GUEST_MODE: the vCPU is in L2, and so is its state")


class MpState(IntEnum):
    """GET_MP_STATE: what a vCPU does while it executes nothing."""

    RUNNABLE = 0
    UNINITIALIZED = 1
    INIT_RECEIVED = 2
    HALTED = 3
    SIPI_RECEIVED = 4


# The shared page of a vCPU ("The kvm_run structure"), by offset.
IMMEDIATE_EXIT_AT: Final = 1
EXIT_REASON_AT: Final = 8
FLAGS_AT: Final = 14
EXIT_AT: Final = 32
"""Where the part begins that belongs to the exit reason."""

EXIT_IO: Final = Struct("<BBHIQ")
"""Direction (1: OUT), size, port, count, the data's offset in the page."""
EXIT_MMIO: Final = Struct("<Q8sIB")
"""Address, data, length, whether it is a write."""
EXIT_FAIL_ENTRY: Final = Struct("<QI")
"""The hardware's reason, the processor."""
EXIT_INTERNAL_ERROR: Final = Struct("<II16Q")
"""Suberror, how many words follow, the words."""
EXIT_SYSTEM_EVENT: Final = Struct("<I")

COALESCED_RING: Final = Struct("<II")
"""First and last entry; they are equal where the ring is empty."""
COALESCED_ENTRY: Final = Struct("<QII8s")
"""Port, length, whether it is a port, data."""

MEMORY_REGION: Final = Struct("<IIQQQ")
"""Slot, flags, guest-physical address, size, address of ours."""
IRQ_LEVEL: Final = Struct("<II")
COALESCED_ZONE: Final = Struct("<QII")
"""First address, size, 1 where they are ports."""
PIT_CONFIG: Final = Struct("<I60x")
CPUID_HEADER: Final = Struct("<II")
CPUID_ENTRY: Final = Struct("<7I12x")
"""Leaf, subleaf, flags, EAX, EBX, ECX, EDX."""
MSRS_HEADER: Final = Struct("<II")
MSR_ENTRY: Final = Struct("<IIQ")
REGS: Final = Struct("<18Q")
"""In the order of `REGS_ORDER`."""
REGS_ORDER: Final = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
)  # fmt: skip
SEGMENT: Final = Struct("<QIH10B")
"""Base, limit, selector; type, present, dpl, db, s, l, g, avl, unusable, padding."""
SREGS_SEGMENTS: Final = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
"""The first parts of the special registers, each a `SEGMENT`."""
TABLE: Final = Struct("<QH6x")
SREGS_TABLES: Final = ("gdt", "idt")
"""The next two, each a `TABLE`."""
CONTROLS: Final = Struct("<7Q")
CONTROLS_ORDER: Final = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")
SREGS_SIZE: Final = 312
MP_STATE: Final = Struct("<I")


@dataclass(frozen=True, slots=True)
class Suberror:
    """A KVM_EXIT_INTERNAL_ERROR code ("KVM internal error. Suberror: N")."""

    name: str
    meaning: str
    remedy: str


SUBERRORS: dict[int, Suberror] = {
    1: Suberror(
        "KVM_INTERNAL_ERROR_EMULATION",
        "KVM had to execute an instruction of the guest in software and could not: it decodes to "
        "nothing, KVM does not emulate it, or its bytes could not be fetched",
        "look at the bytes at RIP: if they are not code, the guest jumped astray, and the question "
        "is who set RIP; if they are code, KVM had to emulate because the access went to MMIO or "
        "because the guest state can't be entered without unrestricted guest",
    ),
    2: Suberror(
        "KVM_INTERNAL_ERROR_SIMUL_EX",
        "a fault that KVM must handle came up while it delivered another event",
        "make the guest's IDT, GDT, TSS and stack lie in RAM, not in MMIO or a hole",
    ),
    3: Suberror(
        "KVM_INTERNAL_ERROR_DELIVERY_EV",
        "a VM exit that KVM does not expect there interrupted the delivery of an event",
        "make the guest's IDT, GDT, TSS and stack lie in RAM: delivering an event through MMIO "
        "is not emulated",
    ),
    4: Suberror(
        "KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON",
        "the processor reported an exit reason that KVM has no handler for",
        "if KVM runs nested, its own hypervisor gave an exit that L1 did not ask for: look there",
    ),
    5: Suberror(
        "KVM_INTERNAL_ERROR_NO_EVENT_WINDOW (proposed, never in a release)",
        "no event could be delivered for too long",
        "",
    ),
}
"""The words for `suberror` of an INTERNAL_ERROR exit."""
