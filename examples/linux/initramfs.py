"""An initramfs in which Linux loads KVM and runs `guest.c` as L2.

    python initramfs.py KERNEL_ROOT BUSYBOX OUT

KERNEL_ROOT is where a distribution's kernel package was unpacked (it holds lib/modules), BUSYBOX a
statically linked busybox.  Needs gcc with a static C library.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

MODULES = ("irqbypass.ko", "kvm.ko", "kvm-amd.ko", "kvm-intel.ko")
DIRECTORY, PROGRAM, FILE, LINK, DEVICE = 0o40755, 0o100755, 0o100644, 0o120777, 0o20600
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


def entry(number: int, name: str, mode: int, data: bytes = b"", device: tuple = (0, 0)) -> bytes:
    """One member of a cpio archive in the "newc" form."""
    path = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + path
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


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
    members = [(name, DIRECTORY, b"") for name in ("bin", "dev", "proc", "sys", "lib")]
    members += [("bin/busybox", PROGRAM, busybox.read_bytes()), ("bin/sh", LINK, b"busybox")]
    members += [(f"lib/{name}", FILE, module(root, name)) for name in MODULES]
    members += [("bin/guest", PROGRAM, compiled()), ("init", PROGRAM, INIT)]
    archive = [entry(n, *member) for n, member in enumerate(members, 2)]
    archive.append(entry(1, "dev/console", DEVICE, device=(5, 1)))
    archive.append(entry(0, "TRAILER!!!", 0))
    out.write_bytes(b"".join(archive))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*map(Path, sys.argv[1:]))
