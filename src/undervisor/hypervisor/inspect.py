"""A look into L1 and L2 from below, while the machine rests: registers and memory of either level.

    l2 = World(vcpu, 2)
    l2["rip"], l2.read_gva(l2["rsp"], 8), l2.to_gpa(gva), l2.to_hpa(gpa)

Nothing that is read here changes the machine: page walks set no accessed and no dirty flags.  The
world that is running has all its registers; of the one that is suspended L0 knows what the
architecture saves: for L2 that is in the VMCB or VMCS, and the general registers as they were at
its last exit where somebody kept them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

from undervisor.arch.svm.npt import Purpose, nested_walk
from undervisor.arch.svm.vmcb import NestedControl, Vmcb
from undervisor.arch.vmx import ept
from undervisor.arch.vmx.controls import SecondaryControls
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.paging import READ, WRITE, PageFault, Translation, paging_rules, walk
from undervisor.arch.x86.registers import Gpr
from undervisor.errors import UndervisorError
from undervisor.hypervisor import describe
from undervisor.hypervisor.nested.svm import NestedSvm
from undervisor.hypervisor.nested.vmx import NestedVmx
from undervisor.silicon.memory import PAGE

if TYPE_CHECKING:
    from undervisor.hypervisor.machine import Machine
    from undervisor.hypervisor.vcpu import Vcpu

_MASK64: Final = (1 << 64) - 1
_GPRS: Final[dict[str, int]] = {gpr.name.lower(): int(gpr) for gpr in Gpr}
_CONTROL: Final = ("cr0", "cr2", "cr3", "cr4", "efer")
NAMES: Final = (*_GPRS, "rip", "rflags", *_CONTROL)
"""The registers that can be asked for."""

_GUEST_FIELDS: Final[dict[str, F]] = {
    "rip": F.GUEST_RIP,
    "rsp": F.GUEST_RSP,
    "rflags": F.GUEST_RFLAGS,
    "cr0": F.GUEST_CR0,
    "cr3": F.GUEST_CR3,
    "cr4": F.GUEST_CR4,
}
_HOST_FIELDS: Final[dict[str, F]] = {
    "rip": F.HOST_RIP,
    "rsp": F.HOST_RSP,
    "cr0": F.HOST_CR0,
    "cr3": F.HOST_CR3,
    "cr4": F.HOST_CR4,
}


class NotThere(UndervisorError):
    """An address that nothing is mapped at, or a register that nobody knows."""


class World:
    """One level on one vCPU.  `kept` are general registers that somebody kept for it."""

    def __init__(self, vcpu: Vcpu, level: int, kept: Mapping[int, int] | None = None) -> None:
        if level not in (1, 2):
            raise ValueError(f"level {level}: 1 and 2 can be looked at")
        self.vcpu = vcpu
        self.level = level
        self._kept = kept or {}

    @property
    def is_running(self) -> bool:
        """Whether this world is the one on its vCPU; the other is suspended."""
        return self.vcpu.in_l2 == (self.level == 2)

    @property
    def exists(self) -> bool:
        """Whether there is such a world: an L2 that has been entered."""
        return self.level == 1 or self.vcpu.in_l2 or _has_l2(self.vcpu)

    # -- registers -----------------------------------------------------------------------------

    def __getitem__(self, name: str) -> int:
        """A register; KeyError for an unknown name, NotThere for a value that nobody knows."""
        if name not in NAMES:
            raise KeyError(name)
        with _current(self.vcpu):
            value = self._live(name) if self.is_running else self._saved(name)
        if value is None:
            raise NotThere(
                f"{name} of the suspended L{self.level} is not known: it is not saved by hardware",
                hint="stop while that level runs, or at its exit",
            )
        return value

    def __setitem__(self, name: str, value: int) -> None:
        """Write a register; NotThere where the value is somewhere in a hypervisor's memory."""
        if name not in NAMES:
            raise KeyError(name)
        with _current(self.vcpu):
            if self.is_running:
                self._set_live(name, value & _MASK64)
            elif not self._set_saved(name, value & _MASK64):
                raise NotThere(
                    f"{name} of the suspended L{self.level} cannot be written: L0 does not hold it",
                    hint="stop while that level runs",
                )

    def registers(self) -> dict[str, int]:
        """All registers whose values are known."""
        found = {}
        with _current(self.vcpu):
            for name in NAMES:
                value = self._live(name) if self.is_running else self._saved(name)
                if value is not None:
                    found[name] = value
        return found

    def _live(self, name: str) -> int:
        state = self.vcpu.state
        if name in _GPRS:
            return state.q[_GPRS[name]]
        value: int = getattr(state, name)
        return value

    def _set_live(self, name: str, value: int) -> None:
        vcpu = self.vcpu
        if name in _GPRS:
            vcpu.state.q[_GPRS[name]] = value
        elif name in ("cr0", "cr3", "cr4", "efer"):
            getattr(vcpu, f"set_{name}")(value)
        else:
            setattr(vcpu.state, name, value)

    def _saved(self, name: str) -> int | None:
        if not self.exists:
            raise NotThere("no L2 has been entered on this vCPU")
        if name in _GPRS and name not in ("rax", "rsp"):
            return self._kept.get(_GPRS[name])
        nested = self.vcpu.nested
        if isinstance(nested, NestedVmx):
            return self._saved_vmx(nested, name)
        value: int = getattr(_saved_vmcb(self.vcpu, self.level), name)
        return value

    def _saved_vmx(self, nested: NestedVmx, name: str) -> int | None:
        vmcs = nested.vmx.current
        if vmcs is None:
            return None
        field = (_GUEST_FIELDS if self.level == 2 else _HOST_FIELDS).get(name)
        if field is not None:
            if self.level == 2:
                vmcs.synchronize(self.vcpu.vmcb02)
            return vmcs.fields[field]
        if name == "efer":
            saved = self.vcpu.vmcb02 if self.level == 2 else nested.host_vmcb
            return int(saved.efer)
        if name == "cr2":
            return int(self.vcpu.state.cr2)  # no transition switches it
        return self._kept.get(_GPRS[name]) if name in _GPRS else None

    def _set_saved(self, name: str, value: int) -> bool:
        if not self.exists or (name in _GPRS and name not in ("rax", "rsp")):
            return False
        nested = self.vcpu.nested
        if not isinstance(nested, NestedVmx):
            setattr(_saved_vmcb(self.vcpu, self.level), name, value)
            return True
        vmcs, field = nested.vmx.current, _GUEST_FIELDS.get(name)
        if self.level == 1 or vmcs is None or field is None:
            return False
        vmcs.synchronize(self.vcpu.vmcb02)
        vmcs.fields[field] = value
        vmcs.written.add(field)
        return True

    # -- addresses -----------------------------------------------------------------------------

    def to_gpa(self, gva: int, *, write: bool = False) -> int:
        """The guest-physical address of a linear one in this world; NotThere where unmapped."""
        rules = paging_rules(self["cr0"], self["cr4"], self["efer"], self.vcpu.model.physical_width)
        access = WRITE if write else READ
        found = walk(rules, self["cr3"], gva & _MASK64, access, self._read_entry)
        if isinstance(found, PageFault):
            raise NotThere(
                f"L{self.level}: linear address {gva:#x} is not mapped for this access "
                f"(page-fault error code {found.error_code:#x})"
            )
        return found.gpa

    def to_hpa(self, gpa: int, *, write: bool = False) -> int:
        """The host-physical address of this world's guest-physical one, which L1 calls its own."""
        return gpa if self.level == 1 else _through_l1(self.vcpu, gpa, write=write)

    def _read_entry(self, gpa: int) -> int:
        return self.vcpu.memory.u64(self.to_hpa(gpa))

    # -- memory --------------------------------------------------------------------------------

    def read_gpa(self, gpa: int, size: int) -> bytes:
        """`size` bytes of this world's guest-physical memory."""
        memory = self.vcpu.memory
        return b"".join(memory.read(self.to_hpa(a), n) for a, n in _pages(gpa, size))

    def write_gpa(self, gpa: int, data: bytes) -> None:
        """Write this world's guest-physical memory; nothing where a page is not there."""
        self._write(gpa, data, lambda address: self.to_hpa(address, write=True))

    def read_gva(self, gva: int, size: int) -> bytes:
        """`size` bytes at a linear address."""
        memory = self.vcpu.memory
        return b"".join(memory.read(self.to_hpa(self.to_gpa(a)), n) for a, n in _pages(gva, size))

    def write_gva(self, gva: int, data: bytes) -> None:
        """Write at a linear address, if its pages may be written; nothing where one may not."""
        self._write(
            gva, data, lambda address: self.to_hpa(self.to_gpa(address, write=True), write=True)
        )

    def _write(self, start: int, data: bytes, translate: Callable[[int], int]) -> None:
        places = [(translate(a), a - start, n) for a, n in _pages(start, len(data))]
        for hpa, offset, size in places:
            self.vcpu.memory.write(hpa, data[offset : offset + size])

    def text_of_registers(self) -> str:
        """What is known of the registers, for people."""
        known = self.registers()
        state = "" if self.is_running else ", suspended"
        lines = [f"L{self.level} on vCPU {self.vcpu.index}{state}:"]
        names = [f"{name:6} {value:016x}" for name, value in known.items()]
        lines += ["  " + "  ".join(names[i : i + 4]) for i in range(0, len(names), 4)]
        return "\n".join(lines)


@contextlib.contextmanager
def _current(vcpu: Vcpu) -> Iterator[None]:
    """Have a vCPU on the silicon for a moment."""
    machine = vcpu.machine
    before = machine.current
    machine.switch_to(vcpu)
    try:
        yield
    finally:
        machine.switch_to(before)


def _pages(start: int, size: int) -> Iterator[tuple[int, int]]:
    """The range in parts that lie in one page each."""
    while size > 0:
        part = min(size, PAGE - start % PAGE)
        yield start & _MASK64, part
        start, size = start + part, size - part


def _has_l2(vcpu: Vcpu) -> bool:
    nested = vcpu.nested
    if isinstance(nested, NestedSvm):
        return nested.state.vmcb12 is not None
    return isinstance(nested, NestedVmx) and bool(
        nested.vmx.current and nested.vmx.current.launched
    )


def _saved_vmcb(vcpu: Vcpu, level: int) -> Vmcb:
    """Where SVM keeps a suspended world."""
    if level == 1:
        return vcpu.vmcb01
    assert isinstance(vcpu.nested, NestedSvm)
    assert vcpu.nested.state.vmcb12 is not None
    return vcpu.nested.state.vmcb12


def _through_l1(vcpu: Vcpu, gpa: int, *, write: bool) -> int:
    """L2's guest-physical address through L1's nested tables."""
    nested = vcpu.nested
    if isinstance(nested, NestedSvm) and nested.state.vmcb12 is not None:
        return _through_npt(vcpu, nested, nested.state.vmcb12, gpa, write=write)
    if isinstance(nested, NestedVmx) and nested.vmx.current is not None:
        return _through_ept(vcpu, nested, gpa, write=write)
    raise NotThere("no L2 has been entered on this vCPU")


def _through_npt(vcpu: Vcpu, nested: NestedSvm, vmcb12: Vmcb, gpa: int, *, write: bool) -> int:
    shadow = nested.shadows.current
    if not vmcb12.nested_control & NestedControl.np_enable or shadow is None:
        return gpa
    access = WRITE if write else READ
    found = nested_walk(
        shadow.rules, vmcb12.n_cr3, gpa, access, vcpu.memory.u64, Purpose.FINAL_ADDRESS
    )
    if isinstance(found, Translation):
        return found.gpa
    raise NotThere(
        f"L1's nested page tables do not map L2's guest-physical address {gpa:#x} for this access "
        f"(EXITINFO1 {found.exit_info1:#x})"
    )


def _through_ept(vcpu: Vcpu, nested: NestedVmx, gpa: int, *, write: bool) -> int:
    fields = nested.fields
    if not fields[F.SECONDARY_CONTROLS] & SecondaryControls.enable_ept:
        return gpa
    access = ept.WRITE if write else ept.READ
    found = ept.walk(vcpu.memory.u64, fields[F.EPT_POINTER], gpa, access, nested.ept_rules)
    if isinstance(found, ept.Translation):
        return found.hpa
    raise NotThere(
        f"L1's EPT does not map L2's guest-physical address {gpa:#x} for this access: "
        f"{type(found).__name__} at level {found.level}"
    )


# -- dumps -------------------------------------------------------------------------------------


def dump(machine: Machine) -> str:
    """The registers of the world that runs, whole."""
    return describe.registers(machine.current)


def dump_suspended(machine: Machine) -> str:
    """What is known of the other world on the same vCPU; "" where there is none."""
    vcpu = machine.current
    world = World(vcpu, 1 if vcpu.in_l2 else 2)
    return world.text_of_registers() if world.exists else ""
