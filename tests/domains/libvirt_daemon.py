"""A private libvirtd: its own mounts, processes and network, gone without a trace at the end.

libvirt keeps everything in fixed folders.  In a mount namespace of its own these are folders of
the test's, so neither the machine's libvirt nor another test is touched; the first process of its
process namespace reaps what libvirt leaves to init, and takes all with it when it ends.  /dev/kvm
is hidden: what is tested is what every machine can.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDERS = {"run": "/run/libvirt", "lib": "/var/lib/libvirt", "cache": "/var/cache/libvirt",
           "etc": "/etc/libvirt", "log": "/var/log/libvirt",
           "lock": "/var/lock"}  # fmt: skip
QEMU_CONF = """user = "root"
group = "root"
security_driver = "none"
stdio_handler = "file"
cgroup_controllers = []
namespaces = []
hugetlbfs_mount = "/dev/hugepages"
"""
LIBVIRTD_CONF = 'auth_unix_rw = "none"\nunix_sock_rw_perms = "0700"\n'
START_SECONDS = 30.0


def why_not() -> str:
    """Why there can be no private libvirtd here; empty where there can."""
    try:
        import libvirt  # noqa: F401
    except ImportError:
        return "libvirt-python is not installed"
    missing = [p for p in ("libvirtd", "unshare", "mount", "dnsmasq", "iptables", "ip")
               if not shutil.which(p, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]  # fmt: skip
    if missing:
        return f"{', '.join(missing)} not installed"
    return "" if os.geteuid() == 0 else "namespaces need root"


class PrivateLibvirt:
    """A running libvirtd whose state is in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = f"qemu+unix:///system?socket={folder}/run/libvirt-sock"
        for name in FOLDERS:
            (folder / name).mkdir(parents=True)
        (folder / "etc/qemu.conf").write_text(QEMU_CONF)
        (folder / "etc/libvirtd.conf").write_text(LIBVIRTD_CONF)
        unshare = ["unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
        with open(folder / "daemon.log", "wb") as log:
            self._process = subprocess.Popen(
                [*unshare, "--propagation", "private", sys.executable, __file__, str(folder)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._wait()

    def stop(self) -> None:
        """End it and everything that it started."""
        self._process.send_signal(signal.SIGKILL)  # --kill-child ends the namespace with it
        self._process.wait()

    def _wait(self) -> None:
        import libvirt

        libvirt.registerErrorHandler(lambda *_: None, None)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                libvirt.open(self.uri).close()
                return
            except libvirt.libvirtError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    self.stop()
                    said = (self.folder / "daemon.log").read_text()[-2000:]
                    raise AssertionError(f"libvirtd did not start: {said}") from None
                time.sleep(0.05)


def first_process(folder: str) -> None:
    """Inside: put the folders in place, start libvirtd, reap until it ends."""

    def bind(source: str, target: str) -> None:
        subprocess.run(["mount", "--bind", source, target], check=True)

    for name, target in FOLDERS.items():
        os.makedirs(target, exist_ok=True)
        bind(f"{folder}/{name}", target)
    for name, line in (("passwd", "libvirt-qemu:x:64055:64055::/:/bin/false\n"),
                       ("group", "libvirt-qemu:x:64055:\n")):  # fmt: skip
        text = Path("/etc", name).read_text()
        Path(folder, name).write_text(text if "libvirt-qemu:" in text else text + line)
        bind(f"{folder}/{name}", f"/etc/{name}")
    if os.path.exists("/dev/kvm"):
        # Not even writable, else libvirt asks QEMU about KVM again and again.
        Path(folder, "kvm").touch()
        bind(f"{folder}/kvm", "/dev/kvm")
        subprocess.run(["mount", "-o", "remount,bind,ro", "/dev/kvm"], check=True)
    os.makedirs("/dev/hugepages", exist_ok=True)
    subprocess.run(["mount", "-t", "hugetlbfs", "none", "/dev/hugepages"], check=False)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["ip", "link", "add", "virbr0", "type", "bridge"], check=True)
    subprocess.run(["ip", "link", "set", "virbr0", "up"], check=True)
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    argv = ["libvirtd", "-p", "/run/libvirt/libvirtd.pid"]
    daemon = subprocess.Popen(argv, env={**os.environ, "PATH": path})
    while os.wait()[0] != daemon.pid:
        pass


if __name__ == "__main__":
    first_process(sys.argv[1])
