from dataclasses import replace

import pytest
from machines import AMD, CLIENT, HASWELL, INTEL, machine

from undervisor.domains.choice import Outcome
from undervisor.domains.host_topology import medium, topology
from undervisor.domains.limits import problems
from undervisor.domains.model import Cpu, Disk, Guest, HugePages, Interface, Memory, Mode, Policy
from undervisor.domains.placement import place
from undervisor.domains.recommend import Need, named_model, recommend
from undervisor.domains.tune import tune
from undervisor.errors import BadInput
from undervisor.host.access.recorded import RecordedHost
from undervisor.host.facts.processor import processor

PATH = "/var/lib/libvirt/images/vm.qcow2"
GUEST = Guest("l1", Memory(8 << 20), vcpus=4, disks=(Disk("vda", PATH, format="qcow2"),),
              interfaces=(Interface("bridge", "virbr0", "virtio"),))  # fmt: skip


def tuned(tmp_path, guest=GUEST, need=Need.HERE, extension="vmx", **shape):
    host = RecordedHost(machine(tmp_path / "host", **shape))
    fact = medium(host, PATH)
    found = tune(guest, topology(host), need, extension, {PATH: fact.value})
    return found.guest, {choice.id: choice for choice in found.choices}


def pins(guest):
    return [min(where) for _, where in guest.pinning.vcpus]


def test_a_core_for_each_vcpu_whose_sibling_stays_idle(tmp_path):
    guest, choices = tuned(tmp_path)
    assert pins(guest) == [0, 2, 4, 6]  # siblings are neighbours here
    assert guest.pinning.emulator == {1, 3, 5, 7}
    assert guest.cpu.topology.cores == 4
    assert guest.cpu.topology.threads == 1
    assert "siblings stay idle" in choices["pinning"].why


def test_siblings_are_read_not_guessed(tmp_path):
    guest, _ = tuned(tmp_path, adjacent=False, nodes=2, cores=18)
    # As on the guides' own machine: 36 is the sibling of 0, and 0, 2, 4, 6 are four cores.
    assert pins(guest) == [1, 2, 3, 4]
    assert guest.memory.numa.nodes == {0}


def test_the_nodes_first_core_is_left_to_the_host_where_it_can_be(tmp_path):
    guest, _ = tuned(tmp_path, cores=6)
    assert pins(guest) == [2, 4, 6, 8]


def test_threads_are_used_in_pairs_where_cores_do_not_suffice(tmp_path):
    guest, choices = tuned(tmp_path, replace(GUEST, vcpus=8))
    assert pins(guest) == list(range(8))
    assert (guest.cpu.topology.cores, guest.cpu.topology.threads) == (4, 2)
    assert "fewer cores than vCPUs" in choices["pinning"].why


def test_a_guest_that_no_node_holds_is_not_pinned_and_told(tmp_path):
    guest, choices = tuned(tmp_path, replace(GUEST, vcpus=10), nodes=2)
    assert guest.pinning.vcpus == ()
    assert choices["pinning"].outcome is Outcome.REFUSED


def test_the_node_with_the_memory_is_taken(tmp_path):
    host = RecordedHost(machine(tmp_path / "host", nodes=2, pages={2048: (0, 0)}))
    seen = topology(host)
    poor = replace(seen.nodes[0], free=1 << 20)
    assert place(2, 8 << 20, replace(seen, nodes=(poor, seen.nodes[1]))).node.id == 1


def test_nothing_is_pinned_where_the_processors_can_not_be_read(tmp_path):
    folder = tmp_path / "host"
    path = machine(folder)
    (folder / "files/sys/devices/system/cpu/online").unlink()
    host = RecordedHost(path)
    found = tune(GUEST, topology(host), Need.HERE, "vmx", {})
    assert found.guest.pinning.vcpus == ()
    assert "can't be read" in {c.id: c for c in found.choices}["pinning"].why


@pytest.mark.parametrize(
    ("pages", "size"),
    [({2048: (8192, 4096)}, 2048), ({1 << 20: (16, 8), 2048: (8192, 8192)}, 1 << 20),
     ({1 << 20: (16, 7), 2048: (8192, 4095)}, 0)],
)  # fmt: skip
def test_huge_pages_only_where_enough_are_free(tmp_path, pages, size):
    guest, choices = tuned(tmp_path, pages=pages)
    if size:
        assert guest.memory.huge == (HugePages(size),)
        assert guest.balloon.model == "none"
    else:
        assert guest.memory.huge is None
        assert choices["huge-pages"].outcome is Outcome.TODO
        # One more page than is free, on top of those that there are.
        assert "vm.nr_hugepages = 8193" in choices["huge-pages"].command


def test_huge_pages_of_one_node_are_reserved_there(tmp_path):
    _, choices = tuned(tmp_path, nodes=2)
    assert "/node/node0/hugepages/hugepages-2048kB/nr_hugepages" in choices["huge-pages"].command


def test_what_is_tuned_has_no_problem_on_its_host(tmp_path):
    host = RecordedHost(machine(tmp_path / "h", cores=6, pages={2048: (8192, 8192)}))
    found = tune(GUEST, topology(host), Need.HERE, "vmx", {PATH: medium(host, PATH).value})
    assert problems(found.guest, topology(host)) == ()
    again = tune(found.guest, topology(host), Need.HERE, "vmx", {PATH: medium(host, PATH).value})
    assert again.guest == found.guest
    assert not [c for c in again.choices if c.outcome is Outcome.CHANGED]


@pytest.mark.parametrize(
    ("filesystem", "cache", "io"), [("ext4", "none", "native"), ("tmpfs", "writeback", "threads")]
)
def test_disks_follow_the_file_system(tmp_path, filesystem, cache, io):
    guest, _ = tuned(tmp_path, filesystem=filesystem)
    (disk,) = guest.disks
    assert (disk.cache, disk.io, disk.queues, disk.iothread) == (cache, io, 4, 1)
    assert guest.iothreads == 1
    assert guest.pinning.iothreads == ((1, guest.pinning.emulator),)


@pytest.mark.parametrize("vhost", [True, False])
def test_the_network_gets_vhost_where_the_host_has_it(tmp_path, vhost):
    guest, choices = tuned(tmp_path, vhost=vhost)
    (interface,) = guest.interfaces
    assert (interface.driver, interface.queues) == (("vhost", 4) if vhost else ("", None))
    assert choices["network-0"].command == ("" if vhost else "sudo modprobe vhost_net")


@pytest.mark.parametrize(
    ("cpu", "model"),
    [(INTEL, "Broadwell"), (HASWELL, "Haswell-noTSX-IBRS"), (CLIENT, "Skylake-Client"),
     (AMD, "EPYC-Rome")],
)  # fmt: skip
def test_a_migratable_guest_gets_the_nearest_named_model(tmp_path, cpu, model):
    here = processor(RecordedHost(machine(tmp_path / "host", cpu=cpu)))
    assert named_model(here) == model
    found = recommend(Need.MIGRATION, here.extension, here)
    assert found.cpu.mode is Mode.CUSTOM
    assert found.cpu.model == model
    assert found.cpu.fallback == "forbid"
    assert found.cpu.policy(here.extension) is Policy.REQUIRE


def test_a_processor_without_a_model_is_told(tmp_path):
    odd = ("GenuineIntel", 6, 1, "i686", "vmx", 36)
    here = processor(RecordedHost(machine(tmp_path / "host", cpu=odd)))
    with pytest.raises(BadInput, match="no named model"):
        recommend(Need.MIGRATION, "vmx", here)
    with pytest.raises(BadInput, match="no named model"):
        recommend(Need.MIGRATION, "svm", None)


def test_speed_gives_up_migration(tmp_path):
    assert recommend(Need.SPEED, "vmx").cpu.migratable is False
    assert recommend(Need.HERE, "vmx").cpu.migratable is None


def test_tuning_keeps_a_cpu_that_nests_and_repairs_one_that_does_not(tmp_path):
    named = replace(GUEST, cpu=Cpu(Mode.CUSTOM, "EPYC").with_feature("svm", Policy.REQUIRE))
    assert tuned(tmp_path, named, extension="svm", cpu=AMD)[0].cpu.model == "EPYC"
    lacking = replace(GUEST, cpu=Cpu(Mode.CUSTOM, "Broadwell"))
    (tmp_path / "b").mkdir()
    assert tuned(tmp_path / "b", lacking)[0].cpu.mode is Mode.PASSTHROUGH


def test_the_hosts_pieces_are_read(tmp_path):
    seen = topology(RecordedHost(machine(tmp_path / "h", nodes=2, cores=3, pages={2048: (9, 4)})))
    assert [n.cpus for n in seen.nodes] == [frozenset(range(6)), frozenset(range(6, 12))]
    assert seen.threads == 2
    assert seen.nodes[1].free_pages(2048) == 4
    assert seen.nodes[1].free_pages(1 << 20) == 0
    assert seen.address_bits == 46
