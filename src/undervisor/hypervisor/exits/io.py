"""IN, OUT, INS and OUTS: the permission check that the silicon leaves out, and the port bus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from iced_x86 import Code

from undervisor.arch.svm.exits import IoInfo
from undervisor.arch.x86.events import GP0
from undervisor.arch.x86.registers import Cr0, Cr4, Rflags
from undervisor.hypervisor import decode, mmio
from undervisor.hypervisor.exit import Exit
from undervisor.hypervisor.verdict import ADVANCE, Inject, Verdict
from undervisor.silicon.layout import Env
from undervisor.silicon.memory import PAGE

if TYPE_CHECKING:
    from undervisor.devices.bus import Queue
    from undervisor.hypervisor.vcpu import Vcpu

_INS: Final = (Code.INSB_M8_DX, Code.INSW_M16_DX, Code.INSD_M32_DX)
_OUTS: Final = (Code.OUTSB_DX_M8, Code.OUTSW_DX_M16, Code.OUTSD_DX_M32)
STRINGS: Final = frozenset(_INS + _OUTS)
_MASKS: Final = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF}
_MASK64: Final = (1 << 64) - 1
# A repeated string instruction may be interrupted between any two iterations: it exits again.
_MOST_ITERATIONS: Final = 4096
_ON_IO: Final = 2  # R/W = 10b, while CR4.DE is set
_TRAP_OR_DOWN: Final = Rflags.tf | Rflags.df
_TSS_IO_MAP: Final = 102
_TSS32_TYPES: Final = (9, 11)


def access(vcpu: Vcpu, exit: Exit) -> Verdict:
    """An I/O instruction; EXITINFO1 has the port, the size and the direction."""
    info = exit.info1
    port, size = info >> 16, info >> 4 & 7
    if not permitted(vcpu, port, size):
        return Inject(GP0)
    data = decode.fetch(vcpu)
    length = _PLAIN.get(data[0]) or (data[0] == 0x66 and _PLAIN.get(data[1], -1) + 1)
    if not length:
        return _string(vcpu, port, size, bool(info & IoInfo.in_))
    _transfer(vcpu, port, size, bool(info & IoInfo.in_))
    vcpu.debug_conditions |= breakpoints(vcpu, port, size)
    return ADVANCE[length]


# IN and OUT by first byte, and their length.
_PLAIN: Final = {0xEC: 1, 0xED: 1, 0xEE: 1, 0xEF: 1, 0xE4: 2, 0xE5: 2, 0xE6: 2, 0xE7: 2}


def permitted(vcpu: Vcpu, port: int, size: int) -> bool:
    """SDM 1 "I/O Protection": IOPL, then the TSS's permission bit map."""
    state = vcpu.state
    rflags = state.q[17]
    if not state.cr0 & Cr0.pe:
        return True
    if not rflags & Rflags.vm and state.cpl <= rflags >> 12 & 3:
        return True
    _, attributes, limit, base = state.segment(Env.TR)
    if attributes & 0xF not in _TSS32_TYPES or limit < _TSS_IO_MAP + 1:
        return False
    pointer = vcpu.read_gva_system(base + _TSS_IO_MAP, 2)
    offset = int.from_bytes(pointer, "little") + port // 8
    if offset + 1 > limit:
        return False
    bits = int.from_bytes(vcpu.read_gva_system(base + offset, 2), "little")
    return not bits >> port % 8 & (1 << size) - 1


def breakpoints(vcpu: Vcpu, port: int, size: int) -> int:
    """The DR6 bits of the I/O breakpoints that an access meets. SDM 3B "Debug Registers".

    DR7 has two enable bits a breakpoint, from bit 0, and R/W and LEN, from bit 16.
    """
    state = vcpu.state
    dr7 = state.dr7
    if not dr7 & 0xFF or not state.cr4 & Cr4.de:
        return 0
    met = 0
    for index in range(4):
        kind = dr7 >> 16 + 4 * index
        if dr7 >> 2 * index & 3 and kind & 3 == _ON_IO:
            length = (kind >> 2 & 3) + 1
            first = state.q[(Env.DR0 >> 3) + index] & -length
            met |= int(first < port + size and port < first + length) << index
    return met


def _transfer(vcpu: Vcpu, port: int, size: int, is_in: bool) -> None:
    """One IN to, or OUT from, AL, AX or EAX."""
    q, ports, mask = vcpu.state.q, vcpu.machine.platform.ports, _MASKS[size]
    if not is_in:
        ports.write(port, size, q[0] & mask)
    elif size == 4:
        q[0] = ports.read(port, 4)
    else:
        q[0] = q[0] & ~mask & _MASK64 | ports.read(port, size)


def string(vcpu: Vcpu) -> Verdict:
    """INS or OUTS whose memory operand is no RAM: the silicon reaches for that before the port."""
    decoded = decode.instruction(vcpu)
    port, size = vcpu.state.q[2] & 0xFFFF, decode.memory_size(decoded)
    if not permitted(vcpu, port, size):
        return Inject(GP0)
    return _string(vcpu, port, size, decoded.code in _INS)


def _string(vcpu: Vcpu, port: int, size: int, is_in: bool) -> Verdict:
    """INS or OUTS, all iterations up to a bound."""
    decoded = decode.instruction(vcpu)
    if decoded.code not in STRINGS:
        _transfer(vcpu, port, size, is_in)
        vcpu.debug_conditions |= breakpoints(vcpu, port, size)
        return ADVANCE[decoded.len]
    repeated = decoded.has_rep_prefix or decoded.has_repne_prefix
    mask = decode.string_address_mask(vcpu, decoded)
    q, counter = vcpu.state.q, 1
    for _ in range(_MOST_ITERATIONS if repeated else 1):
        if repeated and not q[counter] & mask:
            return ADVANCE[decoded.len]
        if repeated and mask == _MASK64 and _block(vcpu, decoded, port, size, is_in):
            break
        _iterate(vcpu, decoded, port, size, is_in)
        if repeated:
            q[counter] = decode.merge(q[counter], q[counter] - 1, mask)
        if vcpu.stops_after_iteration(breakpoints(vcpu, port, size)):
            break
    if not repeated or not q[counter] & mask:
        return ADVANCE[decoded.len]
    return vcpu.interrupted_iteration()


def _block(vcpu: Vcpu, decoded: decode.Instruction, port: int, size: int, is_in: bool) -> bool:
    """The iterations whose memory is in one page of RAM, translated once; False: one by one.

    Nothing can trap between them, and what a port raises ends them.
    """
    q, ports = vcpu.state.q, vcpu.machine.platform.ports
    if vcpu.step is not None or vcpu.state.rflags & _TRAP_OR_DOWN or vcpu.state.dr7 & 0xFF:
        return False
    where = decode.linear_address(vcpu, decoded, 0 if is_in else 1)
    count = min(q[1], (PAGE - where % PAGE) // size)
    hpa = mmio.plain_memory(vcpu, where, write=is_in) if count > 1 else None
    if hpa is None:
        return False
    done = 0
    if size == 1 and port in ports.queues:
        _move(vcpu, ports.queues[port], hpa, count, is_in)
        done = count
    while done < count and not (done and vcpu.attention):
        at = hpa + done * size
        if is_in:
            vcpu.memory.write(at, ports.read(port, size).to_bytes(size, "little"))
        else:
            ports.write(port, size, int.from_bytes(vcpu.memory.read(at, size), "little"))
        done += 1
    index = 7 if is_in else 6
    q[1] -= done
    q[index] = q[index] + done * size & _MASK64
    return True


def _move(vcpu: Vcpu, queue: Queue, hpa: int, count: int, is_in: bool) -> None:
    """All bytes between a queue and memory."""
    if is_in:
        vcpu.memory.write(hpa, queue.read_all(count))
    else:
        queue.write_all(vcpu.memory.read(hpa, count))


def _iterate(vcpu: Vcpu, decoded: decode.Instruction, port: int, size: int, is_in: bool) -> None:
    """One iteration of INS or OUTS; GuestFault where its memory operand faults."""
    ports = vcpu.machine.platform.ports
    where = decode.linear_address(vcpu, decoded, 0 if is_in else 1)
    if is_in:
        mmio.check_store(vcpu, where, size)
        mmio.store(vcpu, where, size, ports.read(port, size))
        decode.step_index(vcpu, decoded, 7, size)
    else:
        ports.write(port, size, mmio.load(vcpu, where, size))
        decode.step_index(vcpu, decoded, 6, size)
