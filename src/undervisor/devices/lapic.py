"""The local APIC: interrupts into one processor, and messages to others (Intel SDM, "APIC").

Registers are functions in two tables; xAPIC MMIO and x2APIC MSRs are two doors to them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from undervisor.arch.x86.events import GP0, GuestFault
from undervisor.devices.bus import all_ones
from undervisor.devices.clock import Clock
from undervisor.devices.interrupts import (
    ExternalController,
    InterruptBus,
    InterruptSink,
)
from undervisor.devices.lapic_layout import (
    DEFAULT_BASE,
    FIRST_X2APIC_MSR,
    LVT_READ_ONLY,
    LVT_WRITABLE,
    VERSION,
    X2APIC_UNREADABLE,
    X2APIC_WRITABLE,
    ApicBase,
    ApicError,
    DeliveryMode,
    Icr,
    Lvt,
    Reg,
    Shorthand,
    Spurious,
    TimerMode,
)
from undervisor.devices.lapic_priority import Priorities
from undervisor.devices.lapic_timer import LapicTimer

DELIVERY_MODES: Final = tuple(DeliveryMode)
TIMER_MODES: Final = tuple(TimerMode)
WORD: Final = 0xFFFFFFFF
LINTS: Final = (Reg.LVT_LINT0, Reg.LVT_LINT1)
NOT_MAPPED: Final = -1
FLAT: Final = 0xFFFFFFFF
# Masks of the fields that every interrupt tests, looked up once.
SOFTWARE_ENABLE: Final = int(Spurious.enable)
MASKED: Final = int(Lvt.mask)
ICR_KEPT: Final = ~int(Icr.delivery_status)
SELF_FIXED: Final = int(Icr.of(shorthand=Shorthand.SELF))
LAST_FIXED: Final = int(DeliveryMode.LOWEST_PRIORITY)


class Lapic:
    """One processor's local APIC.

    The loop asks `pending()` before each entry and, when it delivers, calls `acknowledge()`.
    `mmio_page` is the base page while it answers MMIO, else -1: compare before `read`/`write`.
    `enabled` is IA32_APIC_BASE.EN, which CPUID.01H:EDX.APIC mirrors; in `x2apic_mode` the
    registers are MSRs.
    `x2apic` and `tsc_deadline` say what the CPU model advertises; without them the mode cannot
    be entered.
    """

    def __init__(
        self,
        apic_id: int,
        clock: Clock,
        bus: InterruptBus,
        sink: InterruptSink,
        *,
        x2apic: bool = True,
        tsc_deadline: bool = True,
        physical_address_bits: int = 40,
    ) -> None:
        self.initial_id = apic_id
        self.sink = sink
        self.external: ExternalController | None = None
        self._priorities = Priorities(lambda: self.sink.wake())
        self.timer = LapicTimer(clock, self._timer_expired)
        self._bus = bus
        self._tsc_deadline = tsc_deadline
        self._base_reserved = ~(
            ApicBase.bsp
            | ApicBase.enable
            | (ApicBase.x2apic if x2apic else 0)
            | ApicBase.base & ((1 << physical_address_bits) - 1)
        )
        self._readers = self._make_readers()
        self._writers = self._make_writers()
        self._lint_lines = [False, False]
        self._ext_int = False
        self._base = int(ApicBase.of(bsp=int(apic_id == 0), enable=1)) | DEFAULT_BASE
        self._id = apic_id
        self._set_base(self._base)
        self._reset()
        bus.lapics.append(self)

    # what the loop asks

    def pending(self) -> int | None:
        """The vector that INTR would deliver now if the processor took interrupts, or None."""
        if self._ext_int and self.external is not None:
            return self.external.peek()
        return self._priorities.deliverable

    def acknowledge(self) -> int:
        """Take the interrupt that `pending` named: to the in-service state; its vector."""
        if self._ext_int and self.external is not None:
            return self.external.acknowledge()
        vector = self._priorities.deliverable
        if vector is None:
            return self._svr & int(Spurious.vector)
        self._priorities.take(vector)
        if self.timer.resting:
            self.timer.resume()
        return vector

    @property
    def ppr(self) -> int:
        """The processor-priority register."""
        return self._priorities.ppr

    @property
    def tpr(self) -> int:
        """The task-priority register; CR8 is its upper half (`tpr >> 4`)."""
        return self._priorities.tpr

    @tpr.setter
    def tpr(self, value: int) -> None:
        self._priorities.set_tpr(value & 0xFF)

    @property
    def cr8(self) -> int:
        """CR8, the task-priority class."""
        return self._priorities.tpr >> 4

    @cr8.setter
    def cr8(self, value: int) -> None:
        self.tpr = value << 4

    # IA32_APIC_BASE

    @property
    def apic_base(self) -> int:
        """The IA32_APIC_BASE MSR."""
        return self._base

    def write_apic_base(self, value: int) -> None:
        """WRMSR of IA32_APIC_BASE; #GP for reserved bits and forbidden transitions.

        "x2APIC State Transitions": x2APIC mode is entered from xAPIC mode and left by disabling.
        """
        old, new = ApicBase(self._base), ApicBase(value)
        if value & self._base_reserved or (new.x2apic and not new.enable):
            raise GuestFault(GP0)
        if old.x2apic and new.enable and not new.x2apic:
            raise GuestFault(GP0)
        if not old.enable and new.x2apic:
            raise GuestFault(GP0)
        self._set_base(value)
        if not new.enable:
            self._reset()
        elif new.x2apic and not old.x2apic:
            self._icr &= WORD
            self._id = self.initial_id
        self._update_lint0()

    def _set_base(self, value: int) -> None:
        self._base = value
        self.enabled = bool(value & ApicBase.enable)
        self.x2apic_mode = bool(value & ApicBase.x2apic)
        in_xapic_mode = self.enabled and not self.x2apic_mode
        self.mmio_page = value & ApicBase.base if in_xapic_mode else NOT_MAPPED

    def reset_by_init(self) -> None:
        """INIT: "Local APIC State After It Receives an INIT Reset"; base and ID stay."""
        self._reset()

    def set_up_by_firmware(self) -> None:
        """What a PC's firmware leaves on the boot processor: enabled, virtual wire mode."""
        self._write_svr(Spurious.of(vector=0xFF, enable=1))
        self._write_lvt(Reg.LVT_LINT0, Lvt.of(delivery_mode=DeliveryMode.EXTINT, level=1))
        self._write_lvt(Reg.LVT_LINT1, Lvt.of(delivery_mode=DeliveryMode.NMI, level=1))

    def _reset(self) -> None:
        self._priorities.reset()
        self._esr = self._errors = 0
        self._icr = 0
        self._ldr, self._dfr, self._svr = 0, FLAT, 0xFF
        self._lvt: dict[int, int] = dict.fromkeys(LVT_WRITABLE, MASKED)
        self.timer.reset()
        self._update_lint0()

    # MMIO and MSRs

    def read(self, offset: int, size: int) -> int:
        """A load from the base page; a register answers in the first 4 of its 16 bytes."""
        if offset & 0xC:
            return 0
        value = self._read_register(offset >> 4)
        return value >> (8 * (offset & 3)) & all_ones(min(size, 4))

    def write(self, offset: int, size: int, value: int) -> None:
        """A store to the base page; only aligned ones of 4 bytes (or 8, the upper lost) count."""
        if offset & 0xF or size < 4:
            return
        write = self._writers.get(offset >> 4)
        if write is None or offset >> 4 == Reg.SELF_IPI:
            if offset >> 4 not in self._readers:
                self._error(ApicError.ILLEGAL_REGISTER)
            return
        write(value & WORD)

    def read_msr(self, msr: int) -> int:
        """RDMSR of 0x800-0x8FF; #GP outside x2APIC mode and where no register can be read."""
        register = msr - FIRST_X2APIC_MSR
        if not self.x2apic_mode or register in X2APIC_UNREADABLE or register not in self._readers:
            raise GuestFault(GP0)
        return self._icr if register == Reg.ICR else self._readers[register]()

    def write_msr(self, msr: int, value: int) -> None:
        """WRMSR of 0x800-0x8FF; #GP outside x2APIC mode, for reserved bits and other registers."""
        register = msr - FIRST_X2APIC_MSR
        writable = X2APIC_WRITABLE.get(register)
        if not self.x2apic_mode or writable is None or value & ~writable:
            raise GuestFault(GP0)
        if register == Reg.ICR:
            self._icr = value & ICR_KEPT
            self._send(self._icr)
        else:
            self._writers[register](value)

    def _read_register(self, register: int) -> int:
        read = self._readers.get(register)
        if read is None:
            self._error(ApicError.ILLEGAL_REGISTER)
            return 0
        return read()

    def _make_readers(self) -> dict[int, Callable[[], int]]:
        state = self._priorities
        readers: dict[int, Callable[[], int]] = {
            Reg.ID: lambda: self.initial_id if self.x2apic_mode else self._id << 24,
            Reg.VERSION: lambda: VERSION,
            Reg.TPR: lambda: state.tpr,
            Reg.APR: lambda: state.ppr,
            Reg.PPR: lambda: state.ppr,
            Reg.EOI: lambda: 0,
            Reg.RRD: lambda: 0,
            Reg.LDR: self._read_ldr,
            Reg.DFR: lambda: self._dfr,
            Reg.SVR: lambda: self._svr,
            Reg.ESR: lambda: self._esr,
            Reg.ICR: lambda: self._icr & WORD,
            Reg.ICR_HIGH: lambda: self._icr >> 32,
            Reg.INITIAL_COUNT: lambda: self.timer.initial_count,
            Reg.CURRENT_COUNT: self.timer.current_count,
            Reg.DIVIDE: lambda: self.timer.divide_configuration,
        }
        for entry in LVT_WRITABLE:
            readers[entry] = partial(lambda entry: self._lvt[entry], entry)
        for part in range(8):
            readers[Reg.ISR + part] = partial(lambda shift: state.isr >> shift & WORD, 32 * part)
            readers[Reg.TMR + part] = partial(lambda shift: state.tmr >> shift & WORD, 32 * part)
            readers[Reg.IRR + part] = partial(lambda shift: state.irr >> shift & WORD, 32 * part)
        return readers

    def _make_writers(self) -> dict[int, Callable[[int], None]]:
        writers: dict[int, Callable[[int], None]] = {
            Reg.ID: self._write_id,
            Reg.TPR: self._write_tpr,
            Reg.EOI: self._end_of_interrupt,
            Reg.LDR: self._write_ldr,
            Reg.DFR: self._write_dfr,
            Reg.SVR: self._write_svr,
            Reg.ESR: self._write_esr,
            Reg.ICR: self._write_icr,
            Reg.ICR_HIGH: self._write_icr_high,
            Reg.INITIAL_COUNT: self.timer.write_initial_count,
            Reg.DIVIDE: self.timer.write_divide,
            Reg.SELF_IPI: self._write_self_ipi,
        }
        for entry in LVT_WRITABLE:
            writers[entry] = partial(self._write_lvt, entry)
        return writers

    # registers

    def _write_id(self, value: int) -> None:
        self._id = value >> 24

    def _write_tpr(self, value: int) -> None:
        self.tpr = value

    def _read_ldr(self) -> int:
        if self.x2apic_mode:
            return (self.initial_id >> 4) << 16 | 1 << (self.initial_id & 0xF)
        return self._ldr

    def _write_ldr(self, value: int) -> None:
        self._ldr = value & 0xFF000000

    def _write_dfr(self, value: int) -> None:
        self._dfr = value | 0x0FFFFFFF

    def _write_svr(self, value: int) -> None:
        self._svr = value & Spurious.DECLARED
        if not value & SOFTWARE_ENABLE:
            for entry in self._lvt:
                self._lvt[entry] |= MASKED
        self._update_lint0()

    def _write_esr(self, value: int) -> None:
        self._esr, self._errors = self._errors, 0

    def _write_lvt(self, entry: Reg, value: int) -> None:
        value = value & LVT_WRITABLE[entry] | self._lvt[entry] & LVT_READ_ONLY
        if not self._svr & SOFTWARE_ENABLE:
            value |= MASKED
        if entry == Reg.LVT_TIMER:
            mode = TIMER_MODES[Lvt(value).timer_mode]
            if mode is TimerMode.TSC_DEADLINE and not self._tsc_deadline:
                mode, value = TimerMode.ONE_SHOT, value & ~int(Lvt.timer_mode)
            self.timer.set_mode(mode)
        self._lvt[entry] = value
        if entry == Reg.LVT_TIMER:
            self.timer.resume()
        if entry in LINTS:
            self._update_lint0()
            self._sample_lint(LINTS.index(entry), edge=False)

    # interrupts out

    def _write_icr_high(self, value: int) -> None:
        self._icr = self._icr & WORD | (value & 0xFF000000) << 32

    def _write_icr(self, value: int) -> None:
        low = value & Icr.DECLARED & WORD & ICR_KEPT
        self._icr = self._icr & ~WORD | low
        # An xAPIC's destination is the top byte of the high half.
        self._send(low | self._icr >> 56 << 32)

    def _write_self_ipi(self, value: int) -> None:
        self._send(SELF_FIXED | value)

    def _send(self, icr: int) -> None:
        """Send what an ICR value says; its destination field is a plain number here."""
        if not self._bus.command(self, icr):
            self._error(ApicError.SEND_ILLEGAL_VECTOR)

    # interrupts in

    def is_physical(self, destination: int) -> bool:
        """Whether a physical destination names this APIC."""
        return self.enabled and destination == (self.initial_id if self.x2apic_mode else self._id)

    def is_logical(self, destination: int) -> bool:
        """Whether a logical destination (flat, cluster or x2APIC) includes this APIC."""
        if not self.enabled:
            return False
        if self.x2apic_mode:
            own = self._read_ldr()
            return own >> 16 == destination >> 16 and bool(own & destination & 0xFFFF)
        own = self._ldr >> 24
        if destination > 0xFF:
            return False
        if self._dfr >> 28 == 0xF:
            return bool(own & destination)
        return own >> 4 == destination >> 4 and bool(own & destination & 0xF)

    def accept(self, mode: DeliveryMode, vector: int, level: bool) -> bool:
        """Take an interrupt message; False when the APIC is disabled for it."""
        if not self.enabled:
            return False
        if mode <= LAST_FIXED:
            return self._accept_fixed(vector, level)
        if mode is DeliveryMode.NMI:
            self.sink.nmi()
        elif mode is DeliveryMode.INIT:
            self.sink.init()
        elif mode is DeliveryMode.STARTUP:
            self.sink.sipi(vector)
        elif mode is DeliveryMode.SMI:
            self.sink.smi()
        else:
            return False
        return True

    def _accept_fixed(self, vector: int, level: bool) -> bool:
        if not self._svr & SOFTWARE_ENABLE:
            return False
        if vector < 16:
            self._error(ApicError.RECEIVE_ILLEGAL_VECTOR)
            return False
        self._priorities.request(vector, level)
        return True

    def _end_of_interrupt(self, value: int) -> None:
        vector = self._priorities.end()
        if vector is not None and self._priorities.is_level(vector):
            self._end_local_level(vector)
            self._bus.end_of_interrupt(vector)

    def _error(self, error: ApicError) -> None:
        if not self._errors & error:
            self._errors |= error
            self._fire(Reg.LVT_ERROR)

    # local sources

    def performance_interrupt(self) -> None:
        """A performance counter overflowed; its LVT entry masks itself."""
        self._fire(Reg.LVT_PERFORMANCE)
        self._lvt[Reg.LVT_PERFORMANCE] |= MASKED

    def _timer_expired(self) -> bool:
        """Deliver; whether another expiry would do anything before something else happens."""
        self._fire(Reg.LVT_TIMER)
        lvt = self._lvt[Reg.LVT_TIMER]
        return not (lvt & MASKED or self._priorities.irr >> (lvt & 0xFF) & 1)

    def _fire(self, entry: Reg) -> None:
        """Deliver one edge of a local source as its LVT entry says."""
        lvt = self._lvt[entry]
        if not lvt & MASKED:
            self.accept(DELIVERY_MODES[lvt >> 8 & 7], lvt & 0xFF, False)

    def set_lint(self, pin: int, level: bool) -> None:
        """Drive LINT0 (the 8259 pair's output) or LINT1 (the board's NMI line)."""
        rises = level and not self._lint_lines[pin]
        self._lint_lines[pin] = level
        if pin == 0:
            self._update_lint0()
        self._sample_lint(pin, edge=rises)

    def _update_lint0(self) -> None:
        """Whether LINT0 asks for an ExtINT cycle: wired through while the APIC is disabled."""
        lvt = Lvt(self._lvt[Reg.LVT_LINT0])
        through = not lvt.mask and lvt.delivery_mode == DeliveryMode.EXTINT
        before = self._ext_int
        self._ext_int = self._lint_lines[0] and (through or not self.enabled)
        if self._ext_int and not before:
            self.sink.wake()

    def _sample_lint(self, pin: int, *, edge: bool) -> None:
        """Deliver from a LINT pin: on a rise, or while a level-triggered fixed one is high."""
        entry = LINTS[pin]
        lvt = Lvt(self._lvt[entry])
        if lvt.mask or not self.enabled or lvt.delivery_mode == DeliveryMode.EXTINT:
            return
        if lvt.level and lvt.delivery_mode == DeliveryMode.FIXED:
            if (
                self._lint_lines[pin]
                and not lvt.remote_irr
                and self.accept(DeliveryMode.FIXED, lvt.vector, True)
            ):
                self._lvt[entry] |= int(Lvt.remote_irr)
        elif edge:
            self._fire(entry)

    def _end_local_level(self, vector: int) -> None:
        for pin, entry in enumerate(LINTS):
            lvt = Lvt(self._lvt[entry])
            if lvt.remote_irr and lvt.vector == vector:
                self._lvt[entry] &= ~int(Lvt.remote_irr)
                self._sample_lint(pin, edge=False)
