import pytest
from machines import machine

from undervisor.domains.limits import Weight
from undervisor.domains.network import from_xml, isolated, problems, routes, to_xml
from undervisor.errors import BadInput
from undervisor.host.access.recorded import RecordedHost

ROUTES = (
    "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
    "eth0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
    "eth0\t0001A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
    "virbr0\t007AA8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
)


@pytest.mark.parametrize(
    ("address", "first", "last"),
    [("192.168.100.1/24", "192.168.100.2", "192.168.100.254"),
     ("10.0.0.6/29", "10.0.0.1", "10.0.0.5"), ("172.16.0.1/29", "172.16.0.2", "172.16.0.6")],
)  # fmt: skip
def test_the_rest_of_the_network_is_given_away(address, first, last):
    made = isolated("n", address)
    assert tuple(map(str, made.range)) == (first, last)
    assert from_xml(to_xml(made)) == made
    assert problems(made) == ()


@pytest.mark.parametrize(
    "address", ["", "x", "10.0.0.1", "10.0.0.1/30", "10.0.0.1/33", "10.0.0.0/24", "10.0.0.255/24",
                "::1/64"],
)  # fmt: skip
def test_an_address_that_can_not_be_a_bridges_is_told(address):
    with pytest.raises(BadInput):
        isolated("n", address)


def xml(inner, name="n"):
    return f"<network><name>{name}</name>{inner}</network>"


@pytest.mark.parametrize(
    ("text", "id_", "weight"),
    [
        (xml("", "a/b"), "network-name", Weight.REFUSED),
        (xml("<bridge name='a-very-long-bridge'/>"), "bridge-name", Weight.REFUSED),
        (xml("<forward/>"), "not-isolated", Weight.WARN),
        (xml("<forward mode='route'/>"), "not-isolated", Weight.WARN),
        (xml("<ip address='8.8.8.1' prefix='24'/>"), "public-address", Weight.WARN),
        (xml("<ip address='10.0.0.1' prefix='24'><dhcp><range start='10.0.1.2' end='10.0.1.9'/>"
             "</dhcp></ip>"), "dhcp-outside", Weight.REFUSED),
        (xml("<ip address='10.0.0.1' prefix='24'><dhcp><range start='10.0.0.1' end='10.0.0.9'/>"
             "</dhcp></ip>"), "dhcp-overlaps", Weight.WARN),
    ],
)  # fmt: skip
def test_a_networks_limits_are_checked(text, id_, weight):
    assert {p.id: p.weight for p in problems(from_xml(text))}[id_] is weight


@pytest.mark.parametrize(
    "inner",
    ["<ip address='x'/>", "<ip address='10.0.0.1' prefix='x'/>",
     "<ip address='10.0.0.1' prefix='24'><dhcp><range start='a' end='b'/></dhcp></ip>"],
)  # fmt: skip
def test_a_network_that_can_not_be_read_is_bad_input(inner):
    with pytest.raises(BadInput):
        from_xml(xml(inner))


def test_routes_are_read_in_the_kernels_byte_order():
    assert [(n, str(net)) for n, net in routes(ROUTES)] == [
        ("eth0", "192.168.1.0/24"), ("virbr0", "192.168.122.0/24"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("address", "bridge", "ids"),
    [("192.168.1.1/24", "", {"address-taken"}), ("192.168.0.1/16", "", {"address-taken"}),
     ("192.168.122.1/24", "virbr0", {"bridge-taken"}), ("10.9.8.1/24", "virbr9", set())],
)  # fmt: skip
def test_what_the_host_has_already_is_refused(tmp_path, address, bridge, ids):
    folder = tmp_path / "host"
    path = machine(folder)
    (folder / "files/proc/net").mkdir()
    (folder / "files/proc/net/route").write_text(ROUTES)
    (folder / "files/sys/class/net").mkdir(parents=True)
    (folder / "files/sys/class/net/virbr0").write_text("")
    host = RecordedHost(path)
    assert {p.id for p in problems(isolated("n", address, bridge), host)} == ids
