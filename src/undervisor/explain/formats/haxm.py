"""HAXM's dump of a VMCS: a line `encoding name: value` for each field, in hexadecimal."""

from __future__ import annotations

import re

from undervisor.arch.vmx.fields import VmcsField
from undervisor.explain.dump import VMX, Dump
from undervisor.explain.names import vmx_field

MARKERS = (
    b" VMX_PIN_CONTROLS:",
    b" VMX_PRIMARY_PROCESSOR_CONTROLS:",
    b" VM_EXIT_INFO_REASON:",
    b" HOST_RIP:",
    b" GUEST_RIP:",
    b" GUEST_CR0:",
)

_LINE = re.compile(
    r"(?<![\w.])([0-9a-fA-F]{1,4}) ((?:VMX|VM_EXIT_INFO|HOST|GUEST)_[A-Z0-9_]{1,50}): "
    r"([0-9a-fA-F]{1,16})\b"
)
LEAST = 4
"""Fewer lines than this may be anything."""


def read(lines: list[str]) -> list[Dump]:
    """The dump in `lines`; a field that is printed twice begins a new one."""
    dumps: list[Dump] = []
    state: dict[int, int] = {}
    for line in lines:
        match = _LINE.search(line)
        if match is None:
            continue
        field = vmx_field(f"{int(match[1], 16):04x}")
        if field is None:
            field = vmx_field(match[2])
        if field is None:
            continue
        if field in state:
            dumps.append(Dump("HAXM VMCS dump", VMX, state))
            state = {}
        state[field] = int(match[3], 16) & VmcsField(field).mask
    dumps.append(Dump("HAXM VMCS dump", VMX, state))
    return [dump for dump in dumps if len(dump.state) >= LEAST]
