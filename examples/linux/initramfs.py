"""An initramfs in which Linux loads KVM and runs `guest.c` as L2.

    python initramfs.py KERNEL_ROOT BUSYBOX OUT

KERNEL_ROOT is where a distribution's kernel package was unpacked (it holds lib/modules), BUSYBOX a
statically linked busybox.  Needs undervisor, and gcc with a static C library.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from undervisor.guest.newc import Archive

MODULES = ("irqbypass.ko", "kvm.ko", "kvm-amd.ko", "kvm-intel.ko")
INIT = b"""#!/bin/busybox sh
busybox() { /bin/busybox "$@"; }
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
busybox insmod /lib/irqbypass.ko
busybox insmod /lib/kvm.ko
vendor=intel
busybox grep -qw svm /proc/cpuinfo && vendor=amd
busybox insmod /lib/kvm-$vendor.ko
busybox echo "L1 is Linux $(busybox uname -r), nested: \
$(busybox cat /sys/module/kvm_$vendor/parameters/nested)"
/bin/guest
busybox poweroff -f
"""


def compiled() -> bytes:
    """`guest.c` as a static program."""
    source = Path(__file__).with_name("guest.c")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "guest"
        subprocess.run(["gcc", "-O2", "-Wall", "-static", "-o", program, source], check=True)
        return program.read_bytes()


def module(root: Path, name: str) -> bytes:
    """A kernel module of the unpacked package."""
    found = next(iter(sorted(root.glob(f"lib/modules/*/kernel/**/{name}"))), None)
    if found is None:
        raise SystemExit(f"{name} is not below {root}/lib/modules; is it compressed or built in?")
    return found.read_bytes()


def main(root: Path, busybox: Path, out: Path) -> None:
    """Write the archive: devices need no root, they are only named in it."""
    archive = Archive()
    for name in ("bin", "dev", "proc", "sys", "lib"):
        archive.folder(name)
    archive.file("bin/busybox", busybox.read_bytes(), program=True)
    archive.link("bin/sh", "busybox")
    for name in MODULES:
        archive.file(f"lib/{name}", module(root, name))
    archive.file("bin/guest", compiled(), program=True)
    archive.file("init", INIT, program=True)
    archive.device("dev/console", 5, 1)
    out.write_bytes(archive.finish())


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*map(Path, sys.argv[1:]))
