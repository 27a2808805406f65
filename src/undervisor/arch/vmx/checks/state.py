"""Rules that the manual states in the same words for the host-state and the guest-state area."""

from __future__ import annotations

from collections.abc import Callable

from undervisor.arch.vmx.capabilities import ProcessorFacts, VmxCapabilities
from undervisor.arch.vmx.checks.declare import Condition, Section, State
from undervisor.arch.vmx.fields import VmcsField
from undervisor.arch.x86.registers import Cr0, Cr3, Cr4, Efer

HIGH_HALF = 0xFFFF_FFFF_0000_0000
CR0_WP = Cr0.wp
CR0_NEVER_CHECKED = Cr0.cd | Cr0.nw
"""CR0.CD and CR0.NW, which no VMX transition changes."""
CR4_CET = Cr4.cet
CR3_LAM = Cr3.lam_u48 | Cr3.lam_u57
S_CET_RESERVED = 0x3C0
S_CET_SUPPRESS, S_CET_TRACKER = 1 << 10, 1 << 11
FRED_CONFIG_RESERVED = 0x834
FRED_RSP_RESERVED = 0x3F
FRED_SSP_RESERVED = 0x7
PAGE_BITS = 0xFFF


class Side:
    """One of the two areas: its field prefix and the manual's word for it."""

    def __init__(self, section: Section, prefix: str) -> None:
        self.section = section
        self.prefix = prefix
        self.word = prefix.lower()

    def field(self, name: str) -> VmcsField:
        """The area's field for a register."""
        return VmcsField[f"{self.prefix}_{name}"]

    def canonical(
        self,
        name: str,
        register: str,
        *,
        section: Section | None = None,
        condition: Condition | None = None,
        reads: tuple[int, ...] = (),
        given: str = "",
        keep: int = (1 << 64) - 1,
    ) -> None:
        """The address in a register must be canonical; `keep` are the bits that hold it."""
        field = self.field(register)

        def holds(s: State, c: VmxCapabilities) -> bool:
            value = s[field] & keep
            if value < c.canonical_below or value >= c.canonical_from:
                return True
            return condition is not None and not condition(s)

        (section or self.section).rule(
            name,
            f"{given}{field.name} must hold a canonical address",
            (field, *reads),
            holds,
            "give an address whose upper bits all equal the highest bit of the linear-address "
            "width",
            assumes="the processor's linear-address width",
        )

    def clear(
        self,
        name: str,
        register: str,
        bits: int,
        what: str,
        condition: Condition,
        reads: tuple[int, ...],
        given: str,
    ) -> None:
        """Fixed bits of a register must be 0."""
        field = self.field(register)
        self.section.rule(
            name,
            f"If {given}, {what} of {field.name} must be 0",
            (field, *reads),
            lambda s, c: not s[field] & bits or not condition(s),
            f"clear {what}",
        )

    def supported(
        self,
        name: str,
        register: str,
        allowed: Callable[[ProcessorFacts], int],
        condition: Condition,
        reads: tuple[int, ...],
        given: str,
    ) -> None:
        """Bits of an MSR that the processor reserves must be 0."""
        field = self.field(register)
        self.section.rule(
            name,
            f"If {given}, bits that are reserved in IA32_{register} must be 0 in {field.name}",
            (field, *reads),
            lambda s, c: not s[field] or not s[field] & ~allowed(c.processor) or not condition(s),
            f"give a value that WRMSR to IA32_{register} would accept",
            assumes=f"the bits of IA32_{register} that the processor supports",
        )


def cr_rules(side: Side) -> None:
    """CR4 must be supported in VMX operation, and CET needs write protection."""
    cr0, cr4 = side.field("CR0"), side.field("CR4")
    side.section.rule(
        "cr4.must-be-one",
        f"Bits that VMX operation requires to be 1 must be 1 in {cr4.name}",
        (cr4,),
        lambda s, c: not c.cr4_fixed0 & ~s[cr4],
        "OR the value with IA32_VMX_CR4_FIXED0; CR4.VMXE (bit 13) is always among its bits",
        assumes="IA32_VMX_CR4_FIXED0",
    )
    side.section.rule(
        "cr4.may-be-one",
        f"Bits that VMX operation does not support must be 0 in {cr4.name}",
        (cr4,),
        lambda s, c: not s[cr4] & ~c.cr4_fixed1,
        "AND the value with IA32_VMX_CR4_FIXED1",
        assumes="IA32_VMX_CR4_FIXED1",
    )
    side.section.rule(
        "cr4.cet",
        f"If CR4.CET is 1 in {cr4.name}, CR0.WP must be 1 in {cr0.name}",
        (cr4, cr0),
        lambda s, c: not s[cr4] & CR4_CET or s[cr0] & CR0_WP,
        "set CR0.WP (bit 16) or clear CR4.CET (bit 23)",
    )


def cr3_rule(side: Side) -> None:
    """CR3 must hold a physical address."""
    cr3 = side.field("CR3")
    side.section.rule(
        "cr3.width",
        f"{cr3.name} must not set bits beyond the physical-address width (LAM bits excepted where "
        "supported)",
        (cr3,),
        lambda s, c: not s[cr3] & c.beyond_maxphyaddr & ~(CR3_LAM if c.processor.lam else 0),
        "give the physical address of the top table; bit 63, which MOV to CR3 takes as a hint, "
        "must be 0 here",
        assumes="the processor's physical-address width and LAM",
    )


def sysenter_rules(side: Side) -> None:
    """The SYSENTER addresses must be canonical."""
    side.canonical("sysenter-esp", "SYSENTER_ESP")
    side.canonical("sysenter-eip", "SYSENTER_EIP")


def is_pat(value: int) -> bool:
    """Whether each of the eight bytes is UC, WC, WT, WP, WB or UC-: below 8, but not 2 or 3."""
    low = 0x0101_0101_0101_0101
    return not value & ~(7 * low) and not value >> 1 & ~(value >> 2) & low


def pat_rule(side: Side, condition: Condition, reads: tuple[int, ...], given: str) -> None:
    """Each byte of IA32_PAT must be a memory type."""
    field = side.field("PAT")
    side.section.rule(
        "pat",
        f"If {given}, each byte of {field.name} must be 0 (UC), 1 (WC), 4 (WT), 5 (WP), 6 (WB) or "
        "7 (UC-)",
        (field, *reads),
        lambda s, c: not condition(s) or is_pat(s[field]),
        "use 0007040600070406H, the value after reset, unless there is a reason for another",
    )


def efer_reserved(processor: ProcessorFacts) -> int:
    """The bits of IA32_EFER that the processor has."""
    return (
        (Efer.sce if processor.syscall else 0)
        | (Efer.lme | Efer.lma if processor.long_mode else 0)
        | (Efer.nxe if processor.no_execute else 0)
    )


def cet_rules(side: Side, condition: Condition, reads: tuple[int, ...], given: str) -> None:
    """The rules of IA32_S_CET and IA32_INTERRUPT_SSP_TABLE_ADDR."""
    s_cet = side.field("S_CET")
    start = f"If {given}: "
    side.canonical("s-cet.canonical", "S_CET", condition=condition, reads=reads, given=start)
    side.clear("s-cet.reserved", "S_CET", S_CET_RESERVED, "bits 9:6", condition, reads, given)
    both = S_CET_SUPPRESS | S_CET_TRACKER
    side.section.rule(
        "s-cet.tracker",
        f"If {given}, SUPPRESS and TRACKER (bits 10 and 11) of {s_cet.name} must not both be 1",
        (s_cet, *reads),
        lambda s, c: s[s_cet] & both != both or not condition(s),
        "clear one of them",
    )
    side.canonical(
        "interrupt-ssp-table",
        "INTERRUPT_SSP_TABLE_ADDR",
        condition=condition,
        reads=reads,
        given=start,
    )


def fred_rules(side: Side, condition: Condition, reads: tuple[int, ...], given: str) -> None:
    """The rules of the FRED MSRs: what WRMSR would refuse."""
    start = f"If {given}: "
    reserved = "bits 11, 5:4 and 2"
    side.clear(
        "fred.config.reserved",
        "FRED_CONFIG",
        FRED_CONFIG_RESERVED,
        reserved,
        condition,
        reads,
        given,
    )
    side.canonical(
        "fred.config.canonical",
        "FRED_CONFIG",
        condition=condition,
        reads=reads,
        given=start,
        keep=~PAGE_BITS & (1 << 64) - 1,
    )
    for kind, bits, what in (
        ("RSP", FRED_RSP_RESERVED, "bits 5:0"),
        ("SSP", FRED_SSP_RESERVED, "bits 2:0"),
    ):
        for level in (1, 2, 3):
            name, register = f"fred.{kind.lower()}{level}", f"FRED_{kind}{level}"
            side.clear(f"{name}.aligned", register, bits, what, condition, reads, given)
            side.canonical(
                f"{name}.canonical", register, condition=condition, reads=reads, given=start
            )


def pkrs_rule(side: Side, condition: Condition, reads: tuple[int, ...], given: str) -> None:
    """IA32_PKRS has 32 bits."""
    side.clear("pkrs", "PKRS", HIGH_HALF, "bits 63:32", condition, reads, given)
