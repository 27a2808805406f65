"""A nested guest for real, inside a machine that we reach by a shell only.

The guest is nine bytes: it writes 42 to port 0xf4 and halts.  It is run by whatever is there, in
this order: Python's own ioctls on /dev/kvm (nothing else needed), then QEMU with `-accel kvm`,
which fails where it would have to emulate.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from undervisor.host.access.protocol import Host
from undervisor.host.fact import Absent, Denied, Fact, Known, Unknown

SECONDS = 60.0
"""An L2 under an emulated L1 starts in seconds, a wedged one never."""

_CODE = r"\xb0\x2a\xba\xf4\x00\xee\xf4\xeb\xfd"
"""mov al, 42; mov dx, 0xf4; out dx, al; hlt; jmp to the hlt.  The same at 0x1000 and at 0x7c00."""

PYTHON = f'''
import ctypes, fcntl, mmap, os, struct
# KVM API: KVM_CREATE_VM, SET_USER_MEMORY_REGION, CREATE_VCPU, GET_SREGS, SET_SREGS, SET_REGS, RUN
kvm = os.open("/dev/kvm", os.O_RDWR)
vm = fcntl.ioctl(kvm, 0xAE01, 0)
ram = mmap.mmap(-1, 0x1000)
ram[:9] = b"{_CODE}"
at = ctypes.addressof(ctypes.c_char.from_buffer(ram))
fcntl.ioctl(vm, 0x4020AE46, struct.pack("<IIQQQ", 0, 0, 0x1000, 0x1000, at))
vcpu = fcntl.ioctl(vm, 0xAE41, 0)
run = mmap.mmap(vcpu, fcntl.ioctl(kvm, 0xAE04, 0))
sregs = bytearray(312)
fcntl.ioctl(vcpu, 0x8138AE83, sregs)
sregs[0:8] = bytes(8)
sregs[12:14] = bytes(2)
fcntl.ioctl(vcpu, 0x4138AE84, bytes(sregs))
fcntl.ioctl(vcpu, 0x4090AE82, struct.pack("<18Q", *[0] * 16, 0x1000, 2))
fcntl.ioctl(vcpu, 0xAE80, 0)
reason = struct.unpack_from("<I", run, 8)[0]
if reason != 2:
    print("exit", reason, "detail", hex(struct.unpack_from("<Q", run, 32)[0]))
else:
    port = struct.unpack_from("<H", run, 34)[0]
    print("port", hex(port), "value", run[struct.unpack_from("<Q", run, 40)[0]])
'''
"""Prints what the first exit to user space was; KVM_EXIT_IO is 2."""

_QEMU = r"""
f=$(mktemp) && {{ printf '{code}'; head -c 501 /dev/zero; printf '\125\252'; }} > "$f" &&
for q in qemu-system-x86_64 qemu-kvm kvm /usr/libexec/qemu-kvm; do
  command -v $q > /dev/null || continue
  timeout {seconds} $q -accel kvm -cpu host -nodefaults -display none -m 32 -no-reboot \
    -device isa-debug-exit,iobase=0xf4,iosize=1 -drive file="$f",format=raw,if=ide < /dev/null
  s=$?; rm -f "$f"; echo "qemu ended with $s"; exit $s
done
rm -f "$f"; exit 127
"""

_EXPECTED = 42 << 1 | 1
"""isa-debug-exit ends QEMU with this for a write of 42."""


@dataclass(frozen=True, slots=True)
class Proof:
    """Whether the guest ran to its end, and the evidence."""

    ran: bool
    evidence: str


def prove(host: Host) -> Fact[Proof]:
    """Run the guest on `host`; absent where neither Python nor QEMU is there."""
    fact = host.run(["python3", "-c", PYTHON], SECONDS)
    if isinstance(fact, Known) and not _lacks_python(fact.value.stderr):
        return Known(_by_python(fact.value.status, fact.value.stdout, fact.value.stderr), "KVM API")
    if isinstance(fact, Unknown):
        return fact
    # In octal, which every printf knows.
    code = re.sub(r"\\x(..)", lambda m: f"\\{int(m[1], 16):03o}", _CODE)
    script = _QEMU.format(code=code, seconds=int(SECONDS))
    fact = host.run(["sh", "-c", script], SECONDS + 5)
    if not isinstance(fact, Known):
        return fact
    if fact.value.status == 127:
        return Absent("python3, qemu-system-x86_64")
    ran = fact.value.status == _EXPECTED
    said = (fact.value.stderr.strip().splitlines() or [fact.value.stdout.strip()])[-1]
    return Known(Proof(ran, "QEMU with -accel kvm ran a guest to its end" if ran else said), "QEMU")


def _lacks_python(words: str) -> bool:
    """A Python without ctypes, as small images have it, proves nothing either way."""
    return "ModuleNotFoundError" in words or "ImportError" in words


def _by_python(status: int, said: str, error: str) -> Proof:
    if status == 0 and said.strip() == "port 0xf4 value 42":
        return Proof(True, "a guest made by /dev/kvm wrote 42 to port 0xf4")
    words = error.strip().splitlines() or said.strip().splitlines() or [f"status {status}"]
    return Proof(False, words[-1][:200])


def missing(fact: Fact[Proof]) -> str:
    """What would make the proof possible."""
    if isinstance(fact, Absent):
        return "install python3 or qemu-system-x86 in the guest"
    return fact.how_to_know if isinstance(fact, Denied | Unknown) else ""
