import struct

import pytest

from undervisor.devices import firmware

LENGTHS = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}


def placed(cpu_count=4):
    return dict(firmware.build(cpu_count, 0x000506E3))


def read(memory, address, form):
    return struct.unpack(form, memory[address])[0]


def test_the_bios_data_area_names_com1_and_the_end_of_base_memory():
    memory = placed()
    assert read(memory, 0x400, "<H") == 0x3F8
    assert read(memory, 0x413, "<H") == 639
    assert read(memory, 0x40E, "<H") << 4 == 639 << 10
    assert memory[639 << 10] == b"\x01"
    assert min(memory) >= 0x400


def test_the_floating_pointer_sums_to_zero_and_leads_to_the_table():
    memory = placed()
    pointer = memory[0xF0000]
    assert pointer[:4] == b"_MP_"
    assert len(pointer) == 16
    assert sum(pointer) & 0xFF == 0
    assert struct.unpack_from("<I", pointer, 4)[0] == 0xF0010


@pytest.mark.parametrize("cpu_count", [1, 4, 8])
def test_the_configuration_table_is_consistent(cpu_count):
    table = placed(cpu_count)[0xF0010]
    assert table[:4] == b"PCMP"
    assert sum(table) & 0xFF == 0
    length, count = struct.unpack_from("<H", table, 4)[0], struct.unpack_from("<H", table, 34)[0]
    assert length == len(table)
    assert struct.unpack_from("<I", table, 36)[0] == 0xFEE00000
    kinds, at = [], 44
    while at < length:
        kinds.append((table[at], table[at : at + LENGTHS[table[at]]]))
        at += LENGTHS[table[at]]
    assert at == length
    assert len(kinds) == count
    processors = [(data[1], data[3]) for kind, data in kinds if kind == 0]
    assert processors == [(cpu, 3 if cpu == 0 else 1) for cpu in range(cpu_count)]
    pins = {data[5]: data[7] for kind, data in kinds if kind == 3}
    assert pins[0] == 2
    assert all(pins[irq] == irq for irq in pins if irq)
