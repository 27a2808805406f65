"""The I/O bitmaps and the MSR bitmap of vmcs12."""

from __future__ import annotations

from undervisor.arch.vmx.controls import PrimaryControls
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.silicon.memory import Memory

_BITMAP_PORTS = 0x8000
_HIGH_MSRS = 0xC000_0000
_MSRS = 0x2000
_WRITE_OFFSET = 0x800
_HIGH_OFFSET = 0x400


def port_exits(memory: Memory, primary: int, fields: dict[int, int], port: int, size: int) -> bool:
    """SDM 3C "I/O-Bitmap Addresses": any port of the access set, or one that wraps, exits."""
    if not primary & PrimaryControls.use_io_bitmaps:
        return bool(primary & PrimaryControls.unconditional_io_exiting)
    if port + size > 0x10000:
        return True
    for number in range(port, port + size):
        bitmap = F.IO_BITMAP_A_ADDRESS if number < _BITMAP_PORTS else F.IO_BITMAP_B_ADDRESS
        offset = number % _BITMAP_PORTS
        if memory.read(fields[bitmap] + offset // 8, 1)[0] >> offset % 8 & 1:
            return True
    return False


def msr_exits(
    memory: Memory, primary: int, fields: dict[int, int], number: int, *, write: bool
) -> bool:
    """SDM 3C "MSR-Bitmap Address": without a bitmap, and outside its ranges, every access exits."""
    if not primary & PrimaryControls.use_msr_bitmaps:
        return True
    offset = _WRITE_OFFSET if write else 0
    index = number
    if number >= _HIGH_MSRS:
        offset += _HIGH_OFFSET
        index = number - _HIGH_MSRS
    if index >= _MSRS:
        return True
    where = fields[F.MSR_BITMAP_ADDRESS] + offset + index // 8
    return bool(memory.read(where, 1)[0] >> index % 8 & 1)
