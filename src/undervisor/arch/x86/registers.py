"""Control, debug and flag registers: layouts and the rules of loading them.

A `legalize_*` function gives the value that a load stores, or the fault that it raises.
`supported` is always the mask of bits that the processor model has; supported is not enabled.
SDM 3A "Control Registers", SDM 2B "MOV--Move to/from Control Registers"; APM 2 "System-Control
Registers".
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from undervisor.arch.bits import Bits, Register
from undervisor.arch.x86.events import GP0, Fault


class Gpr(IntEnum):
    """The general-purpose registers in the order that instructions encode them."""

    RAX = 0
    RCX = 1
    RDX = 2
    RBX = 3
    RSP = 4
    RBP = 5
    RSI = 6
    RDI = 7
    R8 = 8
    R9 = 9
    R10 = 10
    R11 = 11
    R12 = 12
    R13 = 13
    R14 = 14
    R15 = 15


class Cr0(Register):
    """CR0: operating mode and state of the processor."""

    pe = Bits(0, about="Protection Enable")
    mp = Bits(1, about="Monitor Coprocessor")
    em = Bits(2, about="Emulation")
    ts = Bits(3, about="Task Switched")
    et = Bits(4, about="Extension Type, always 1")
    ne = Bits(5, about="Numeric Error")
    wp = Bits(16, about="Write Protect")
    am = Bits(18, about="Alignment Mask")
    nw = Bits(29, about="Not Write-through")
    cd = Bits(30, about="Cache Disable")
    pg = Bits(31, about="Paging")


class Cr3(Register):
    """CR3 outside PAE paging: the root of the paging structures.

    Bits 11:0 are the PCID when CR4.PCIDE is set; PWT and PCD are part of them then.
    """

    pwt = Bits(3, about="Page-level Write-Through")
    pcd = Bits(4, about="Page-level Cache Disable")
    base = Bits(51, 12, about="physical page number of the root table")
    lam_u57 = Bits(61, about="LAM for user pointers, 57-bit")
    lam_u48 = Bits(62, about="LAM for user pointers, 48-bit")
    no_flush = Bits(63, about="keep the PCID's translations on a load; never stored")


CR3_PCID: Final = 0xFFF
CR3_ROOT: Final = Cr3.base
CR3_PAE_ROOT: Final = 0xFFFF_FFE0


class Cr4(Register):
    """CR4: architectural extensions."""

    vme = Bits(0, about="Virtual-8086 Mode Extensions")
    pvi = Bits(1, about="Protected-Mode Virtual Interrupts")
    tsd = Bits(2, about="Time Stamp Disable")
    de = Bits(3, about="Debugging Extensions")
    pse = Bits(4, about="Page Size Extensions")
    pae = Bits(5, about="Physical Address Extension")
    mce = Bits(6, about="Machine-Check Enable")
    pge = Bits(7, about="Page Global Enable")
    pce = Bits(8, about="Performance-Monitoring Counter Enable")
    osfxsr = Bits(9, about="OS support for FXSAVE and FXRSTOR")
    osxmmexcpt = Bits(10, about="OS support for unmasked SIMD floating-point exceptions")
    umip = Bits(11, about="User-Mode Instruction Prevention")
    la57 = Bits(12, about="57-bit linear addresses")
    vmxe = Bits(13, about="VMX Enable")
    smxe = Bits(14, about="SMX Enable")
    fsgsbase = Bits(16, about="FSGSBASE Enable")
    pcide = Bits(17, about="PCID Enable")
    osxsave = Bits(18, about="XSAVE and processor extended states Enable")
    kl = Bits(19, about="Key Locker Enable")
    smep = Bits(20, about="Supervisor-Mode Execution Prevention")
    smap = Bits(21, about="Supervisor-Mode Access Prevention")
    pke = Bits(22, about="Protection keys for user-mode pages")
    cet = Bits(23, about="Control-flow Enforcement Technology")
    pks = Bits(24, about="Protection keys for supervisor-mode pages")
    uintr = Bits(25, about="User Interrupts Enable")
    lass = Bits(27, about="Linear-Address-Space Separation")
    lam_sup = Bits(28, about="Linear-Address Masking for supervisor pointers")
    fred = Bits(32, about="Flexible Return and Event Delivery")


class Efer(Register):
    """EFER, MSR C000_0080H. APM 2 "Extended Feature Enable Register (EFER)"."""

    sce = Bits(0, about="System Call Extensions")
    lme = Bits(8, about="Long Mode Enable")
    lma = Bits(10, about="Long Mode Active")
    nxe = Bits(11, about="No-Execute Enable")
    svme = Bits(12, about="Secure Virtual Machine Enable")
    lmsle = Bits(13, about="Long Mode Segment Limit Enable")
    ffxsr = Bits(14, about="Fast FXSAVE/FXRSTOR")
    tce = Bits(15, about="Translation Cache Extension")
    mcommit = Bits(17, about="Enable MCOMMIT instruction")
    intwb = Bits(18, about="Interruptible WBINVD/WBNOINVD Enable")
    uaie = Bits(20, about="Upper Address Ignore Enable")
    aibrse = Bits(21, about="Automatic IBRS Enable")


class Rflags(Register):
    """RFLAGS. SDM 1 "EFLAGS Register"."""

    cf = Bits(0)
    one = Bits(1, about="always 1")
    pf = Bits(2)
    af = Bits(4)
    zf = Bits(6)
    sf = Bits(7)
    tf = Bits(8)
    if_ = Bits(9)
    df = Bits(10)
    of_ = Bits(11)
    iopl = Bits(13, 12)
    nt = Bits(14)
    rf = Bits(16)
    vm = Bits(17)
    ac = Bits(18)
    vif = Bits(19)
    vip = Bits(20)
    id = Bits(21)


class Dr6(Register):
    """DR6, debug status. BLD and RTM read as 1 when the condition did *not* occur."""

    b0 = Bits(0)
    b1 = Bits(1)
    b2 = Bits(2)
    b3 = Bits(3)
    bld = Bits(11, about="Bus Lock Detected, active low")
    bd = Bits(13, about="debug register access detected")
    bs = Bits(14, about="single step")
    bt = Bits(15, about="task switch")
    rtm = Bits(16, about="Restricted Transactional Memory, active low")


class Dr7(Register):
    """DR7, debug control."""

    l0 = Bits(0)
    g0 = Bits(1)
    l1 = Bits(2)
    g1 = Bits(3)
    l2 = Bits(4)
    g2 = Bits(5)
    l3 = Bits(6)
    g3 = Bits(7)
    le = Bits(8)
    ge = Bits(9)
    one = Bits(10, about="always 1")
    rtm = Bits(11)
    gd = Bits(13, about="General Detect enable")
    rw0 = Bits(17, 16)
    len0 = Bits(19, 18)
    rw1 = Bits(21, 20)
    len1 = Bits(23, 22)
    rw2 = Bits(25, 24)
    len2 = Bits(27, 26)
    rw3 = Bits(29, 28)
    len3 = Bits(31, 30)


class Xcr0(Register):
    """XCR0. SDM 1 "XSAVE-Supported Features and State-Component Bitmaps"."""

    x87 = Bits(0)
    sse = Bits(1)
    avx = Bits(2)
    bndregs = Bits(3)
    bndcsr = Bits(4)
    opmask = Bits(5)
    zmm_hi256 = Bits(6)
    hi16_zmm = Bits(7)
    pkru = Bits(9)
    tilecfg = Bits(17)
    tiledata = Bits(18)
    apx = Bits(19)
    lwp = Bits(62, about="AMD Lightweight Profiling")


DR6_FIXED_ONE: Final = 0xFFFF_0FF0
DR7_FIXED_ONE: Final = 0x400
RFLAGS_FIXED_ONE: Final = 0x2
HIGH_HALF: Final = 0xFFFF_FFFF_0000_0000

_XCR0_MPX = Xcr0.bndregs | Xcr0.bndcsr
_XCR0_AVX512 = Xcr0.opmask | Xcr0.zmm_hi256 | Xcr0.hi16_zmm
_XCR0_AMX = Xcr0.tilecfg | Xcr0.tiledata


def is_paging_combination_legal(cr0: int) -> bool:
    """Whether CR0 has neither paging without protection nor NW without CD."""
    return not (cr0 & Cr0.pg and not cr0 & Cr0.pe) and not (cr0 & Cr0.nw and not cr0 & Cr0.cd)


def legalize_cr0(old: int, new: int, *, cr4: int, efer: int, cs_long: bool = False) -> int | Fault:
    """The CR0 that MOV to CR0 stores.

    `cs_long` is CS.L.  Undeclared bits 31:0 are ignored, ET stays set.  EFER.LMA follows: see
    `efer_after_cr0`.  PDPTEs, where they must be loaded, are the caller's (`check_pdptes`).
    """
    if new & HIGH_HALF or not is_paging_combination_legal(new):
        return GP0
    paging = new & Cr0.pg
    if paging and not old & Cr0.pg and efer & Efer.lme and (cs_long or not cr4 & Cr4.pae):
        return GP0
    if not paging and old & Cr0.pg and (cr4 & Cr4.pcide or (efer & Efer.lma and cs_long)):
        return GP0
    if not new & Cr0.wp and cr4 & Cr4.cet:
        return GP0
    return new & Cr0.DECLARED | Cr0.et


def legalize_lmsw(old: int, source: int) -> int:
    """The CR0 that LMSW stores: bits 3:0 of the source, but PE can't be cleared."""
    return old & ~0xE | source & 0xF


def efer_after_cr0(efer: int, cr0: int) -> int:
    """EFER with LMA as a new CR0 leaves it: LME and paging together activate long mode."""
    active = efer & Efer.lme and cr0 & Cr0.pg
    return efer | Efer.lma if active else efer & ~Efer.lma


def legalize_cr3(
    new: int, *, cr4: int, efer: int, physical_width: int, lam: bool = False
) -> int | Fault:
    """The CR3 that MOV to CR3 stores, with bit 63 cleared; `lam`: the processor has LAM."""
    if not efer & Efer.lma:
        return new & 0xFFFF_FFFF
    if cr4 & Cr4.pcide:
        new &= ~Cr3.no_flush
    reserved = (1 << 64) - (1 << physical_width)
    if lam:
        reserved &= ~(Cr3.lam_u57 | Cr3.lam_u48)
    return GP0 if new & reserved else new


def legalize_cr4(
    old: int, new: int, *, supported: int, cr0: int, cr3: int, efer: int
) -> int | Fault:
    """The CR4 that MOV to CR4 stores."""
    long_mode = efer & Efer.lma
    changed = old ^ new
    if new & ~supported:
        return GP0
    if long_mode and (not new & Cr4.pae or changed & Cr4.la57):
        return GP0
    if changed & new & Cr4.pcide and (not long_mode or cr3 & CR3_PCID):
        return GP0
    if new & Cr4.cet and not cr0 & Cr0.wp:
        return GP0
    return new


def legalize_cr8(new: int) -> int | Fault:
    """The task priority that MOV to CR8 stores: bits 3:0, the others reserved."""
    return GP0 if new & ~0xF else new


def legalize_efer(old: int, new: int, *, supported: int, cr0: int) -> int | Fault:
    """The EFER that WRMSR stores; LMA is the processor's and keeps its value."""
    new = new & ~Efer.lma | old & Efer.lma
    if new & ~(supported | Efer.lma):
        return GP0
    if (old ^ new) & Efer.lme and cr0 & Cr0.pg:
        return GP0
    return new


def legalize_xcr0(new: int, *, supported: int) -> int | Fault:
    """The XCR0 that XSETBV stores. SDM 1 "Enabling the XSAVE Feature Set"."""
    if new & ~supported or not new & Xcr0.x87:
        return GP0
    if new & Xcr0.avx and not new & Xcr0.sse:
        return GP0
    if new & _XCR0_AVX512 and (new & _XCR0_AVX512 != _XCR0_AVX512 or not new & Xcr0.avx):
        return GP0
    if new & _XCR0_MPX not in (0, _XCR0_MPX) or new & _XCR0_AMX not in (0, _XCR0_AMX):
        return GP0
    return new


def legalize_dr6(new: int) -> int | Fault:
    """The DR6 that MOV to DR6 stores; the reserved bits keep their fixed values."""
    # BLD and RTM are among the fixed ones: they read as 1 unless their condition occurred.
    return GP0 if new & HIGH_HALF else new & Dr6.DECLARED | DR6_FIXED_ONE


def legalize_dr7(new: int) -> int | Fault:
    """The DR7 that MOV to DR7 stores; the reserved bits keep their fixed values."""
    return GP0 if new & HIGH_HALF else new & (Dr7.DECLARED & ~Dr7.rtm) | DR7_FIXED_ONE


def legalize_rflags(new: int) -> int:
    """RFLAGS with its reserved bits at their fixed values."""
    return new & Rflags.DECLARED | RFLAGS_FIXED_ONE
