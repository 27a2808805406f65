"""Structures in memory that VMX refers to: regions, bitmaps, descriptors, logs.

SDM, chapters "Virtual Machine Control Structures", "VMX Instruction Reference", "APIC
Virtualization and Virtual Interrupts" and "VMX Support for Address Translation".
"""

from __future__ import annotations

from enum import IntEnum

from undervisor.arch.bits import Bits, Register

# --- VMXON and VMCS regions -----------------------------------------------------------------------

REGION_REVISION_OFFSET = 0
REGION_ABORT_OFFSET = 4


class RegionHeader(Register):
    """The first 4 bytes of a VMXON or VMCS region ("Format of the VMCS Region")."""

    WIDTH = 32
    revision = Bits(30, 0, "VMCS revision identifier")
    shadow = Bits(31, about="Shadow-VMCS indicator")


NO_VMCS = (1 << 64) - 1
"""The current-VMCS pointer when there is none, and the link pointer that links nothing."""

# --- Bitmaps --------------------------------------------------------------------------------------

LOW_MSRS = range(0x2000)
HIGH_MSRS = range(0xC000_0000, 0xC000_2000)
MSR_BITMAP_HIGH = 1024
MSR_BITMAP_WRITE = 2048
IO_BITMAP_SIZE = 4096
PORTS = 1 << 16
MSRS_IN_BITMAP = 0x2000


def msr_bitmap_bit(index: int, *, write: bool) -> int | None:
    """The bit number in the MSR bitmaps for an access; None: no bit, the access always exits.

    The four bitmaps of 1 KByte are: read low, read high, write low, write high.
    """
    if index in LOW_MSRS:
        byte = 0
    elif index in HIGH_MSRS:
        byte = MSR_BITMAP_HIGH
    else:
        return None
    return (byte + (MSR_BITMAP_WRITE if write else 0)) * 8 + index % MSRS_IN_BITMAP


def io_bitmap_bits(port: int, size: int) -> list[tuple[int, int]] | None:
    """For each byte of an access, which bitmap (0: A, 1: B) and which bit of it.

    None where the access wraps around the 16-bit port space, which always exits.
    """
    if port + size > PORTS:
        return None
    return [divmod(number, IO_BITMAP_SIZE * 8) for number in range(port, port + size)]


def vmcs_shadow_bit(encoding: int) -> int | None:
    """The bit number in the VMREAD or VMWRITE bitmap for a field; None: the access always exits.

    Only encodings with bits 31:15 clear have a bit.
    """
    return encoding if encoding < 1 << 15 else None


# --- Operands of INVEPT and INVVPID ---------------------------------------------------------------


class InveptType(IntEnum):
    """The type operand of INVEPT."""

    SINGLE_CONTEXT = 1
    ALL_CONTEXT = 2


class InvvpidType(IntEnum):
    """The type operand of INVVPID."""

    INDIVIDUAL_ADDRESS = 0
    SINGLE_CONTEXT = 1
    ALL_CONTEXT = 2
    SINGLE_CONTEXT_RETAINING_GLOBALS = 3


class InveptDescriptor(Register):
    """The 128-bit INVEPT descriptor; bits 127:64 are reserved."""

    WIDTH = 128
    eptp = Bits(63, 0, "EPTP")


class InvvpidDescriptor(Register):
    """The 128-bit INVVPID descriptor; bits 63:16 are reserved."""

    WIDTH = 128
    vpid = Bits(15, 0, "VPID")
    linear_address = Bits(127, 64, "Linear address")


# --- Page-modification log ------------------------------------------------------------------------

PML_ENTRIES = 512
PML_ENTRY_SIZE = 8


def pml_entry_offset(index: int) -> int | None:
    """Where the log entry of `index` is in its page; None: the log is full, the access exits.

    The index counts down from 511; after entry 0 it wraps to FFFFH.
    """
    return index * PML_ENTRY_SIZE if index < PML_ENTRIES else None


# --- Virtualization-exception information area ----------------------------------------------------


class VirtualizationException(IntEnum):
    """Offsets in the virtualization-exception information area ("Virtualization Exceptions")."""

    EXIT_REASON = 0
    BUSY = 4
    EXIT_QUALIFICATION = 8
    GUEST_LINEAR_ADDRESS = 16
    GUEST_PHYSICAL_ADDRESS = 24
    EPTP_INDEX = 32


VE_BUSY = 0xFFFF_FFFF
"""What the processor writes at BUSY; it delivers no #VE while the value is not 0."""

# --- Posted-interrupt descriptor ------------------------------------------------------------------


class PostedInterruptDescriptor(Register):
    """The 64-byte posted-interrupt descriptor."""

    WIDTH = 512
    requests = Bits(255, 0, "Posted-interrupt requests, one bit for each vector")
    outstanding = Bits(256, about="Outstanding notification")


# --- EPTP list ------------------------------------------------------------------------------------

EPTP_LIST_ENTRIES = 512
