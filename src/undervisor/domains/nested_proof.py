"""A nested guest for real, inside a machine that we reach by a shell only.

The guest is a few bytes, run by whatever is there, in this order: Python's own ioctls on /dev/kvm
(nothing else needed), where it writes 42 to port 0xf4; then QEMU with `-accel kvm`, which fails
where it would have to emulate, and where the guest writes to its serial port.
"""

from __future__ import annotations

from dataclasses import dataclass

from undervisor.host.access.protocol import Host, Output
from undervisor.host.fact import Absent, Denied, Fact, Known, Unknown

SECONDS = 60.0
"""An L2 under an emulated L1 starts in seconds, a wedged one never."""

_CODE = r"\xb0\x2a\xba\xf4\x00\xee\xf4\xeb\xfd"
"""mov al, 42; mov dx, 0xf4; out dx, al; hlt; jmp to the hlt."""

_FIRMWARE_CODE = bytes.fromhex("ba f803 b0 4c ee b0 32 ee fa f4 eb fd")
"""mov dx, 0x3f8; mov al, 'L'; out dx, al; mov al, '2'; out dx, al; cli; hlt; jmp to the hlt."""

_SAID = "L2"

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
f=$(mktemp) && {{ head -c 65408 /dev/zero; printf '{code}'; head -c {gap} /dev/zero
  printf '\353\216'; head -c 14 /dev/zero; }} > "$f"
for q in qemu-system-x86_64 qemu-kvm kvm /usr/libexec/qemu-kvm; do
  command -v $q > /dev/null || continue
  for m in microvm pc; do
    : > "$f.out"
    timeout {seconds} $q -accel kvm -machine $m -cpu host -nodefaults -display none -m 32 \
      -no-reboot -serial stdio -bios "$f" < /dev/null > "$f.out" &
    p=$!
    while [ "$(cat "$f.out")" != {said} ] && kill -0 $p 2> /dev/null; do
      sleep 0.1 2> /dev/null || sleep 1
    done
    kill $p 2> /dev/null; wait $p; s=$?
    [ "$(cat "$f.out")" = {said} ] && echo {said} && s=0 && break
  done
  rm -f "$f" "$f.out"; exit $s
done
rm -f "$f"; exit 127
"""
"""A firmware of 64 KiB: the code 128 bytes below its end, a jump to it where the processor starts,
16 bytes below.  So neither a real firmware nor a certain machine or device is needed."""


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
    code = "".join(f"\\{byte:03o}" for byte in _FIRMWARE_CODE)  # which every printf knows
    script = _QEMU.format(code=code, gap=112 - len(_FIRMWARE_CODE), seconds=int(SECONDS),
                          said=_SAID)  # fmt: skip
    fact = host.run(["sh", "-c", script], 2 * SECONDS + 5)
    if isinstance(fact, Absent) or (isinstance(fact, Known) and fact.value.status == 127):
        return Absent("python3, qemu-system-x86_64")
    if not isinstance(fact, Known):
        return fact
    return Known(_by_qemu(fact.value), "QEMU")


def _by_qemu(output: Output) -> Proof:
    said = output.stdout.strip()
    if output.status == 0 and said.endswith(_SAID):
        return Proof(True, "QEMU with -accel kvm ran a guest to its end")
    words = output.stderr.strip().splitlines()
    return Proof(False, words[0][:200] if words else f"QEMU ended with {output.status}: {said}")


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
