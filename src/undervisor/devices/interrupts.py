"""How interrupt messages find local APICs (Intel SDM, "Determining IPI Destination")."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from undervisor.devices.lapic_layout import BROADCAST, DeliveryMode, Icr, Shorthand

if TYPE_CHECKING:
    from undervisor.devices.lapic import Lapic


DELIVERY_MODES: Final = tuple(DeliveryMode)
SHORTHANDS: Final = tuple(Shorthand)
LAST_FIXED: Final = int(DeliveryMode.LOWEST_PRIORITY)
NOT_SENT: Final = (DeliveryMode.RESERVED, DeliveryMode.EXTINT)
FIRST_LEGAL_VECTOR: Final = 16
LOGICAL: Final = int(Icr.logical)
INIT_LEVEL: Final = Icr.level | Icr.level_triggered
INIT_DEASSERT: Final = int(Icr.level_triggered)  # only the arbitration IDs of old APICs cared


class InterruptSink(Protocol):
    """A local APIC's processor.  None of these may call back into the APIC before returning."""

    def nmi(self) -> None:
        """An NMI arrived."""

    def init(self) -> None:
        """An INIT arrived; when it is taken, the processor calls `Lapic.reset_by_init`."""

    def sipi(self, vector: int) -> None:
        """A startup IPI arrived; it counts only in the wait-for-SIPI state."""

    def smi(self) -> None:
        """An SMI arrived."""

    def wake(self) -> None:
        """`Lapic.pending` is no longer None or names a higher vector: leave HLT and look."""


class ExternalController(Protocol):
    """The 8259 pair, as the processor's ExtINT cycle sees it."""

    def peek(self) -> int:
        """The vector that `acknowledge` would return."""

    def acknowledge(self) -> int:
        """The interrupt-acknowledge cycle."""


class Message(NamedTuple):
    """An interrupt message on the way to local APICs.

    `wide` is set for an x2APIC's 32-bit destination; else `destination` has 8 bits.
    """

    mode: DeliveryMode
    vector: int
    destination: int
    logical: bool = False
    level: bool = False
    wide: bool = False


class InterruptBus:
    """All local APICs of a machine, and who wants to know of EOIs of level interrupts."""

    def __init__(self) -> None:
        self.lapics: list[Lapic] = []
        self.on_eoi: list[Callable[[int], None]] = []

    def command(self, sender: Lapic, icr: int) -> bool:
        """Carry out an ICR write, bits 63:32 being the destination; False for a bad vector.

        "Interrupt Command Register (ICR)".  Reserved delivery modes send nothing.
        """
        mode, vector = DELIVERY_MODES[icr >> 8 & 7], icr & 0xFF
        if mode <= LAST_FIXED:
            if vector < FIRST_LEGAL_VECTOR:
                return False
        elif mode in NOT_SENT or (mode is DeliveryMode.INIT and icr & INIT_LEVEL == INIT_DEASSERT):
            return True
        shorthand = SHORTHANDS[icr >> 18 & 3]
        if shorthand is Shorthand.NONE:
            logical = bool(icr & LOGICAL)
            self.send(Message(mode, vector, icr >> 32, logical, False, sender.x2apic_mode))
        elif shorthand is Shorthand.SELF:
            sender.accept(mode, vector, False)
        else:
            for lapic in self.lapics:
                if lapic is not sender or shorthand is Shorthand.ALL:
                    lapic.accept(mode, vector, False)
        return True

    def send(self, message: Message) -> bool:
        """Deliver to every match, or to one for lowest priority; whether anyone took it."""
        targets = self.targets(message)
        if message.mode is DeliveryMode.LOWEST_PRIORITY and len(targets) > 1:
            targets = [min(targets, key=lambda lapic: lapic.ppr)]
        taken = False
        for lapic in targets:
            taken |= lapic.accept(message.mode, message.vector, message.level)
        return taken

    def targets(self, message: Message) -> list[Lapic]:
        """The APICs that the destination names, by rising ID."""
        destination = message.destination
        if destination == (BROADCAST if message.wide else 0xFF):
            return [lapic for lapic in self.lapics if lapic.enabled]
        if message.logical:
            return [lapic for lapic in self.lapics if lapic.is_logical(destination)]
        return [lapic for lapic in self.lapics if lapic.is_physical(destination)]

    def end_of_interrupt(self, vector: int) -> None:
        """The EOI message that a local APIC broadcasts for a level-triggered interrupt."""
        for listener in self.on_eoi:
            listener(vector)
