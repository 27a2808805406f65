"""The Ansible collection under a real ansible-core: here, and on two hosts over SSH.

The two hosts have a network namespace, a root file system (an overlay of this one) and an SSH
daemon each, and they show the processors of two recorded machines.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
HOSTS = ROOT / "tests" / "hosts"
BIN = Path(sys.executable).parent
PLAYBOOK = shutil.which("ansible-playbook", path=str(BIN)) or shutil.which("ansible-playbook")
SHOWN = {"one": "intel-built-in-nested-off", "two": "amd-l1-host-model"}

pytestmark = pytest.mark.skipif(not PLAYBOOK, reason="needs ansible-core")

HOST = """
set -e
mount -t tmpfs none {work}; cd {work}; mkdir upper scratch root
mount -t overlay overlay -o lowerdir=/,upperdir={work}/upper,workdir={work}/scratch root
mount -t proc proc root/proc; mount --rbind /dev root/dev
mount --bind {machine}/files/proc/cpuinfo root/proc/cpuinfo
mount -t tmpfs none root/sys
[ ! -d {machine}/files/sys ] || cp -r {machine}/files/sys/. root/sys/
mkdir -p root/etc/default root/run/sshd
echo 'GRUB_CMDLINE_LINUX="quiet"' > root/etc/default/grub
exec chroot root {sshd} -D -e -f /dev/null -o ListenAddress={address} -o HostKey={keys}/host \
  -o AuthorizedKeysFile={keys}/user.pub -o StrictModes=no -o UsePAM=no -o PidFile=none
"""


@pytest.fixture
def playbook(tmp_path):
    """Run a playbook of `tasks` or `roles` on an inventory; the results by host and task."""
    collections = tmp_path / "collections" / "ansible_collections" / "undervisor"
    collections.mkdir(parents=True)
    (collections / "nested").symlink_to(ROOT / "ansible")

    def run(plays, inventory, *words):
        (tmp_path / "play.json").write_text(json.dumps(plays))
        (tmp_path / "inventory.json").write_text(json.dumps(inventory))
        environment = {
            **os.environ,
            "ANSIBLE_COLLECTIONS_PATH": str(tmp_path / "collections"),
            "ANSIBLE_STDOUT_CALLBACK": "ansible.builtin.default",
            "ANSIBLE_HOME": str(tmp_path / "home"),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_HOST_KEY_CHECKING": "0",
            "ANSIBLE_SSH_ARGS": "-o ControlMaster=no",
            "LC_ALL": "C.UTF-8",
        }
        return subprocess.run(
            [PLAYBOOK, "-i", tmp_path / "inventory.json", tmp_path / "play.json", *words],
            env=environment, capture_output=True, text=True, timeout=280, cwd=tmp_path,
        )  # fmt: skip

    return run


def here():
    variables = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    return {"all": {"hosts": {"localhost": variables}}}


def check(**options):
    return {
        "undervisor.nested.undervisor_check": {"executable": str(BIN / "undervisor"), **options}
    }


def play(*tasks):
    return [{"hosts": "all", "gather_facts": False, "tasks": list(tasks)}]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("intel-bare-metal", "failed=0"),
        ("software-kvm", "[l0-hides-virtualization]"),
    ],
)
def test_the_module_fails_with_the_cause(playbook, name, words):
    task = check(recording=str(HOSTS / name), require="usable")
    done = playbook(play(task), here())
    assert words in done.stdout, done.stdout + done.stderr
    assert (done.returncode == 0) == (name == "intel-bare-metal")


def test_an_unknown_machine_is_a_failure_with_undervisors_own_words(playbook):
    done = playbook(play(check(recording="/no/such/folder")), here())
    assert "no recording at /no/such/folder" in done.stdout


def test_nesting_in_a_root_folder_is_idempotent_and_undone(playbook, tmp_path):
    (tmp_path / "root" / "etc" / "modprobe.d").mkdir(parents=True)
    options = {"executable": str(BIN / "undervisor"), "root": str(tmp_path / "root")}
    tasks = [
        {"undervisor.nested.undervisor_nested": {**options, "state": state}}
        for state in ("enabled", "enabled", "disabled", "undone")
    ]
    done = playbook(play(*tasks), here())
    assert "changed=3" in done.stdout, done.stdout + done.stderr
    assert list((tmp_path / "root" / "etc" / "modprobe.d").iterdir()) == []


def test_check_mode_changes_nothing(playbook, tmp_path):
    (tmp_path / "root").mkdir()
    options = {"executable": str(BIN / "undervisor"), "root": str(tmp_path / "root")}
    done = playbook(
        play({"undervisor.nested.undervisor_nested": options}), here(), "--check", "--diff"
    )
    assert "+options kvm_intel nested=1" in done.stdout, done.stdout + done.stderr
    assert list((tmp_path / "root").iterdir()) == []


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def machines(tmp_path):
    """An inventory of two hosts, each in its own network namespace and root."""
    sshd = shutil.which("sshd", path="/usr/sbin:/usr/bin")
    if os.geteuid() or not sshd or not shutil.which("ip"):
        pytest.skip("needs root, sshd and ip")
    keys = tmp_path / "keys"
    keys.mkdir()
    for name in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / name], check=True
        )
    running, hosts = [], {}
    try:
        for number, (name, machine) in enumerate(SHOWN.items()):
            space, net = f"uv{os.getpid()}{name}", f"10.231.{os.getpid() % 200}.{8 * number}"
            net = net.rsplit(".", 1)[0]
            above, address = f"{net}.{8 * number + 1}", f"{net}.{8 * number + 2}"
            running.append((space, None))
            ip("netns", "add", space)
            outer = f"uv{os.getpid() % 100000}{number}a"
            ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("addr", "add", f"{above}/30", "dev", outer)
            ip("link", "set", outer, "up")
            for words in (
                ("addr", "add", f"{address}/30", "dev", "eth0"),
                ("link", "set", "eth0", "up"),
            ):
                ip("-n", space, *words)
            (tmp_path / name).mkdir()
            text = HOST.format(work=tmp_path / name, machine=HOSTS / machine, sshd=sshd,
                               address=address, keys=keys)  # fmt: skip
            process = subprocess.Popen(
                ["ip", "netns", "exec", space, "unshare", "-m", "sh", "-c", text],
                stderr=subprocess.PIPE,
            )
            running[-1] = (space, process)
            _wait(address, process)
            hosts[name] = {
                "ansible_host": address,
                "ansible_user": "root",
                "ansible_ssh_private_key_file": str(keys / "user"),
                "ansible_python_interpreter": sys.executable,
                "ansible_ssh_common_args": f"-o UserKnownHostsFile={keys}/known",
            }
        yield {"all": {"hosts": hosts}}
    finally:
        for space, process in running:
            if process:
                process.kill()
                process.wait()
                process.stderr.close()
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


def _wait(address, process):
    for _ in range(100):
        if process.poll() is not None:
            pytest.skip(f"a host could not be made: {process.stderr.read().decode()[-300:]}")
        try:
            socket.create_connection((address, 22), 0.2).close()
            return
        except OSError:
            time.sleep(0.1)
    pytest.skip("a host's sshd did not answer")


@pytest.mark.deep
def test_two_hosts_over_ssh_are_checked_and_enabled(playbook, machines, tmp_path):
    done = playbook(play(check()), machines, "-v")
    assert "nested-off-built-in" in done.stdout, done.stdout + done.stderr
    assert "l0-hides-virtualization" in done.stdout
    role = {"role": "undervisor.nested.nested_kvm",
            "nested_kvm_executable": str(BIN / "undervisor")}  # fmt: skip
    roles = [{"hosts": "all", "gather_facts": False, "roles": [role]}]
    first = playbook(roles, machines)
    assert "the processor shows no svm" in first.stdout, first.stdout + first.stderr
    assert "restart needed: KVM is built into this kernel" in first.stdout
    assert "one" in first.stdout.partition("PLAY RECAP")[2]
    read = {"ansible.builtin.command": "cat /etc/default/grub"}
    shown = playbook(play(read), machines, "-v", "--limit", "one")
    assert "quiet kvm_intel.nested=1" in shown.stdout
    second = playbook(roles, machines, "--limit", "one")
    assert "changed=0" in second.stdout, second.stdout + second.stderr
    ours = Path("/etc/default/grub")
    assert not ours.exists() or "kvm_intel.nested" not in ours.read_text()


@pytest.mark.deep
def test_two_hosts_are_read_from_the_controller(playbook, machines, tmp_path):
    """Nothing of ours on the hosts: the task runs here and reads them over SSH."""
    hosts = machines["all"]["hosts"]
    config = tmp_path / "ssh_config"
    config.write_text(
        f"Host *\n IdentityFile {tmp_path}/keys/user\n IdentitiesOnly yes\n"
        f" UserKnownHostsFile {tmp_path}/keys/known\n StrictHostKeyChecking accept-new\n"
    )
    tasks = [
        check(host="root@{{ ansible_host }}", ssh_config=str(config), security=True)
        | {"delegate_to": "localhost", "register": "told"},
        {"ansible.builtin.debug": {"msg": "{{ inventory_hostname }} is {{ told.cause }}"}},
    ]
    here_too = {"hosts": {"localhost": here()["all"]["hosts"]["localhost"]}}
    inventory = {"all": {"hosts": hosts, "children": {"controller": here_too}}}
    plays = [{"hosts": "one,two", "gather_facts": False, "tasks": tasks}]
    done = playbook(plays, inventory)
    assert "one is nested-off-built-in" in done.stdout, done.stdout + done.stderr
    assert "two is l0-hides-virtualization" in done.stdout
