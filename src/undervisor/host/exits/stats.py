"""KVM's own counters: debugfs (`/sys/kernel/debug/kvm`) and the binary stats file."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from undervisor.errors import BadInput
from undervisor.host.access.protocol import Host
from undervisor.host.fact import Absent, Denied, Fact, Known, Unknown, value_or

DEBUGFS = "/sys/kernel/debug/kvm"

INTERESTING = (
    "exits",
    "nested_run",
    "io_exits",
    "mmio_exits",
    "signal_exits",
    "irq_window_exits",
    "nmi_window_exits",
    "halt_exits",
    "request_irq_exits",
    "irq_exits",
    "host_state_reload",
    "insn_emulation",
    "hypercalls",
    "pf_taken",
    "pf_emulate",
    "tlb_flush",
    "preemption_reported",
    "invlpg",
)
"""Counters that an operator compares, of those that KVM has."""


def debugfs_counters(host: Host) -> Fact[dict[str, int]]:
    """The counters over all guests."""
    names = host.listdir(DEBUGFS)
    if isinstance(names, Absent):
        return Unknown(DEBUGFS, "not there", "mount -t debugfs none /sys/kernel/debug, as root")
    if isinstance(names, Denied | Unknown):
        return names
    texts = {
        name: host.read_line(f"{DEBUGFS}/{name}") for name in INTERESTING if name in names.value
    }
    numbers = {name: value_or(fact, "") for name, fact in texts.items()}
    return Known(
        {name: int(t) for name, t in numbers.items() if t.isdigit() and len(t) < 20}, DEBUGFS
    )


@dataclass(frozen=True, slots=True)
class Counter:
    """One statistic of the binary file: `values` has one element, or one per histogram bucket."""

    name: str
    kind: str
    unit: str
    values: tuple[int, ...]


_KINDS = ("cumulative", "instant", "peak", "linear histogram", "logarithmic histogram")
_UNITS = ("", "bytes", "seconds", "cycles", "boolean")
_SIZE_LIMIT = 1 << 20


def parse_binary(raw: bytes) -> tuple[str, list[Counter]]:
    """The file that KVM_GET_STATS_FD gives: its id and its statistics.

    Layout: kernel document "The Definitive KVM API Documentation", KVM_GET_STATS_FD.  BadInput
    where offsets or sizes do not fit the file.
    """
    if len(raw) > _SIZE_LIMIT:
        raise BadInput(f"a KVM stats file of {len(raw)} bytes", hint=f"at most {_SIZE_LIMIT}")
    if len(raw) < 24:
        raise BadInput("a KVM stats file has a header of 24 bytes")
    _, name_size, count, id_at, descriptors_at, data_at = struct.unpack_from("<6I", raw)
    stride = 16 + name_size
    if not 0 < name_size <= 256 or count > 4096 or descriptors_at + count * stride > len(raw):
        raise BadInput("the descriptors of the KVM stats file do not fit into it")
    name = _text(raw, id_at, name_size)
    return name, [
        _counter(raw, descriptors_at + number * stride, name_size, data_at)
        for number in range(count)
    ]


def _counter(raw: bytes, at: int, name_size: int, data_at: int) -> Counter:
    flags, _exponent, size, offset, _bucket = struct.unpack_from("<IhHII", raw, at)
    name = _text(raw, at + 16, name_size)
    start = data_at + offset
    if not size or start + 8 * size > len(raw):
        raise BadInput(f"the values of {name!r} do not fit into the KVM stats file")
    kind, unit = flags & 0xF, flags >> 4 & 0xF
    return Counter(
        name,
        _KINDS[kind] if kind < len(_KINDS) else f"kind {kind}",
        _UNITS[unit] if unit < len(_UNITS) else f"unit {unit}",
        struct.unpack_from(f"<{size}Q", raw, start),
    )


def _text(raw: bytes, at: int, size: int) -> str:
    if at + size > len(raw):
        raise BadInput("a name does not fit into the KVM stats file")
    return raw[at : at + size].split(b"\0")[0].decode("ascii", "replace")
