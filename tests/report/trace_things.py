"""Transitions made by hand, for the tests of what shows them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    time: int = 5_000
    vcpu: int = 0
    level: int = 2
    to: int = 1
    reason: str = "CPUID"
    rip: int = 0x1036A4
    action: str = "reflect"
    why: str = "L1 intercepts it"
    detail: str = "leaf 0x1.0x0"
    ran: int = 400


@dataclass
class Cell:
    count: int = 1
    host_ns: int = 1000
