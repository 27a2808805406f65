import itertools
import struct

import pytest

from undervisor.devices import acpi

COUNTS = (1, 4, 8)


def tables_of(cpu_count):
    return {data[:4]: (address, data) for address, data in acpi.build(cpu_count)}


def entries(madt):
    """The MADT's structures as `(type, bytes)`."""
    found, at = [], 44
    while at < len(madt):
        kind, length = madt[at], madt[at + 1]
        found.append((kind, madt[at : at + length]))
        at += length
    assert at == len(madt)
    return found


@pytest.mark.parametrize("cpu_count", COUNTS)
def test_every_table_sums_to_zero_and_knows_its_length(cpu_count):
    for signature, (_, data) in tables_of(cpu_count).items():
        if signature in (b"RSD ", b"FACS"):
            continue
        assert sum(data) & 0xFF == 0, signature
        assert struct.unpack_from("<I", data, 4)[0] == len(data), signature


def test_the_root_pointer_is_found_by_a_scan_and_sums_to_zero_in_both_revisions():
    address, data = tables_of(4)[b"RSD "]
    assert address % 16 == 0
    assert 0xE0000 <= address < 0x100000
    assert data[:8] == b"RSD PTR "
    assert data[15] == 2
    assert sum(data[:20]) & 0xFF == 0
    assert sum(data) & 0xFF == 0
    assert len(data) == 36


@pytest.mark.parametrize("cpu_count", COUNTS)
def test_old_and_new_root_tables_point_to_the_same_tables(cpu_count):
    tables = tables_of(cpu_count)
    placed = dict(acpi.build(cpu_count))
    rsdt, xsdt = struct.unpack_from("<I4xQ", tables[b"RSD "][1], 16)
    old = [at for (at,) in struct.iter_unpack("<I", placed[rsdt][36:])]
    new = [at for (at,) in struct.iter_unpack("<Q", placed[xsdt][36:])]
    assert placed[rsdt][:4] == b"RSDT"
    assert placed[xsdt][:4] == b"XSDT"
    assert old == new
    assert [placed[at][:4] for at in old] == [b"FACP", b"APIC"]


@pytest.mark.parametrize("cpu_count", [*COUNTS, 64, 255])
def test_tables_do_not_overlap_and_stay_in_their_area(cpu_count):
    placed = sorted(acpi.build(cpu_count))
    for (first, data), (second, _) in itertools.pairwise(placed):
        assert first + len(data) <= second
    assert placed[-1][0] + len(placed[-1][1]) <= 0xF0000


def test_the_fixed_table_names_registers_and_its_two_tables():
    tables = tables_of(2)
    fadt = tables[b"FACP"][1]
    assert len(fadt) == 244
    facs, dsdt = struct.unpack_from("<II", fadt, 36)
    assert (facs, dsdt) == (tables[b"FACS"][0], tables[b"DSDT"][0])
    assert facs % 64 == 0
    assert struct.unpack_from("<H", fadt, 46)[0] == 9
    assert [struct.unpack_from("<I", fadt, at)[0] for at in (56, 64, 76)] == [0x600, 0x604, 0x608]
    assert struct.unpack_from("<BBBBQ", fadt, 116) == (1, 8, 0, 0, 0xCF9)
    assert fadt[128] == 0x06
    assert struct.unpack_from("<I", fadt, 112)[0] & 1 << 10


@pytest.mark.parametrize("cpu_count", COUNTS)
def test_the_interrupt_table_lists_processors_ioapic_and_overrides(cpu_count):
    madt = tables_of(cpu_count)[b"APIC"][1]
    assert struct.unpack_from("<II", madt, 36) == (0xFEE00000, 1)
    found = entries(madt)
    processors = [struct.unpack("<BBBBI", data)[2:] for kind, data in found if kind == 0]
    assert processors == [(cpu, cpu, 1) for cpu in range(cpu_count)]
    (io,) = [struct.unpack("<BBBBII", data) for kind, data in found if kind == 1]
    assert io[4:] == (0xFEC00000, 0)
    overrides = [struct.unpack("<BBBBIH", data)[3:] for kind, data in found if kind == 2]
    assert overrides == [(0, 2, 0), (9, 9, 0xD)]
    assert [data for kind, data in found if kind == 4] == [b"\x04\x06\xff\x00\x00\x01"]


@pytest.mark.parametrize("cpu_count", [1, 3, 4, 8, 255])
def test_package_lengths_of_the_definition_block_cover_it_exactly(cpu_count):
    body = tables_of(cpu_count)[b"DSDT"][1][36:]

    def package(at):
        """The end of the package whose length byte is at `at`, and where its content starts."""
        lead = body[at]
        if lead >> 6 == 0:
            return at + lead, at + 1
        assert lead >> 6 == 1
        return at + (lead & 0xF | body[at + 1] << 4), at + 2

    assert body[0] == 0x10
    scope_end, at = package(1)
    assert body[at : at + 5] == b"\\_PR_"
    at += 5
    names = []
    while at < scope_end:
        assert body[at : at + 2] == b"\x5b\x83"
        end, content = package(at + 2)
        names.append(body[content : content + 4])
        assert body[content + 4] == len(names) - 1
        assert end == content + 10
        at = end
    assert at == scope_end
    assert len(set(names)) == cpu_count
    assert body[at:] == b"\x08_S5_\x12\x06\x04" + bytes(4)
