"""One processor: VMRUN a VMCB until #VMEXIT, deliver events, count blocks, be kicked.

    processor = Processor(memory)
    processor.load(vmcb)                    # VMRUN: the VMCB's state becomes the running state
    processor.run(on_exit)                  # on_exit(code) -> Action, called at every #VMEXIT
    processor.save(vmcb)                    # #VMEXIT: the running state goes back to the VMCB

`on_exit` runs inside the emulator, with the guest's state live in `processor.state`.  It returns
`Action.RESUME` to go on (after changing whatever it likes), `STOP` to make `run` return, and
`DELIVER` or `DELIVER_HARDWARE` to send the event that it prepared through the guest's IDT first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Final

import unicorn
import unicorn.x86_const as public

from undervisor.arch.svm.vmcb import Vmcb, VmcbField
from undervisor.errors import SiliconDied
from undervisor.silicon import fixes, glue, layout, library
from undervisor.silicon.fpu import Fpu
from undervisor.silicon.layout import STATE_SIZE, Env
from undervisor.silicon.memory import PRIVATE_BASE, Memory
from undervisor.silicon.state import State

RESUME: Final = glue.ACTION_RESUME
STOP: Final = glue.ACTION_STOP
DELIVER: Final = glue.ACTION_DELIVER
DELIVER_HARDWARE: Final = glue.ACTION_DELIVER_HARDWARE

OnExit = Callable[[int], int]

_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int32)
_NO_LIMIT = 1 << 62
_KICK = -(1 << 63)  # makes what is left of any budget negative
_EVENT_VALID = 1 << 31
_TYPE_EXTERNAL, _TYPE_NMI, _TYPE_EXCEPTION, _TYPE_SOFTWARE = 0, 2, 3, 4


class SiliconVmcb(Vmcb):
    """A VMCB of ours, in a private frame: the view, and where the silicon finds it."""

    __slots__ = ("hpa", "pointer")

    def __init__(self, memory: Memory) -> None:
        self.hpa = memory.frames.allocate()
        self.pointer = memory.host_pointer(self.hpa)
        super().__init__(memory.frames.view(self.hpa))


class Processor:
    """Unicorn as an AMD processor that is always in guest mode.

    `intel` decides where the vendors differ in what the silicon does itself.
    One processor carries any number of vCPUs in turn: `park` and `unpark` move the whole state.
    """

    def __init__(self, memory: Memory, *, intel: bool = False) -> None:
        library.check_version()
        library.check_symbols()
        self.memory = memory
        self.engine = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        self.engine.ctl_set_cpu_model(public.UC_CPU_X86_EPYC)
        # No address ends a run: looking for one, the engine would write the guest's CR2.
        self.engine.ctl_exits_enabled(True)
        for start, size, pointer in memory.regions():
            self.engine.mem_map_ptr(start, size, unicorn.UC_PROT_ALL, pointer)
        self._handle = _handle(self.engine)
        self.state = State(self._handle)
        self._cpu, self._env = self.state.cpu, self.state.env
        layout.verify(self.engine, self.state.bytes)
        layout.hide_random_numbers(self._env)
        if intel:
            layout.be_intel(self._env)
        self._error: BaseException | None = None
        self.software = 0, 0  # of the last software event injected: the next RIP, the length
        self._window = False
        self._on_exit: OnExit = lambda code: STOP
        self._callback = _CALLBACK(self._leave)
        self._start = library.api("uc_emu_start")
        self._start.argtypes = [ctypes.c_void_p] + [ctypes.c_uint64] * 3 + [ctypes.c_size_t]
        self._glue = self._compile()
        self._hook()
        self._initial = bytes(self.state.bytes)
        self.fpu = Fpu(self)
        self._window = False
        memory.code_changed = self.invalidate_code

    # -- building -----------------------------------------------------------------------------

    def _compile(self) -> glue.Glue:
        """The glue, linked to the library and to this processor."""
        compiled = glue.Glue(
            {
                "on_exit": ctypes.cast(self._callback, ctypes.c_void_p).value or 0,
                "do_interrupt": library.address("x86_cpu_do_interrupt"),
                "do_hardware_interrupt": library.address("do_interrupt_x86_hardirq"),
                "vmexit": library.address("cpu_vmexit"),
                "tlb_flush": library.address("tlb_flush"),
                "read_eflags": library.address("helper_read_eflags"),
                "emu_stop": ctypes.cast(library.api("uc_emu_stop"), ctypes.c_void_p).value or 0,
            }
        )

        def variable(name: str, value: int) -> ctypes.c_int64:
            cell = ctypes.c_int64.from_address(compiled.variable(name))
            cell.value = value
            return cell

        variable("cpu", self.state.cpu)
        variable("env", self.state.env)
        self._budget = variable("budget", _NO_LIMIT)
        self._blocks = variable("blocks", 0)
        self._exit_cost = variable("exit_cost", 0)
        self._kicked = variable("kicked", 0)
        variable("private", self.memory.host_pointer(PRIVATE_BASE) - PRIVATE_BASE)
        resume, fault = fixes.walk_addresses()
        variable("walk_resume", resume)
        variable("walk_fault", fault)
        pointer, long = ctypes.c_void_p, ctypes.c_uint64

        def native(name: str, *arguments: type) -> Callable[..., None]:
            return ctypes.CFUNCTYPE(None, *arguments)(compiled.function(name))

        self._load_world = native("load_world", pointer, pointer, pointer, long)
        self._save_world = native("save_world", pointer, pointer)
        self._enter_svm = native("enter_svm", *[pointer] * 5, long)
        self._leave_svm = native("leave_svm", *[pointer] * 4, long)
        self._load_extra = native("load_extra", pointer, pointer)
        self._save_extra = native("save_extra", pointer, pointer)
        self._load_vmx = native("load_vmx", pointer, pointer, pointer, long)
        self._save_vmx = native("save_vmx", pointer, pointer)
        where = compiled.variable("instruction")
        self.instruction = (ctypes.c_char * 16).from_address(where)
        return compiled

    def _hook(self) -> None:
        """Put the glue into the engine, and repair the library."""
        for kind, name in (
            (unicorn.UC_HOOK_INTR, "on_interrupt"),
            (unicorn.UC_HOOK_BLOCK, "on_block"),
        ):
            hook = ctypes.c_size_t()
            status = library.api("uc_hook_add")(
                ctypes.c_void_p(self._handle),
                ctypes.byref(hook),
                kind,
                ctypes.c_void_p(self._glue.function(name)),
                None,
                ctypes.c_uint64(1),
                ctypes.c_uint64(0),
            )
            if status:
                raise SiliconDied(f"the processor library refused a hook (error {status})")
        if not _repairs:  # once for the process: what they jump to holds no processor's state
            for name in glue.REDIRECTED:
                fixes.redirect(name, self._glue.function(f"leave_{name}"))
            fixes.repair_no_execute_walk(self._glue.function("walk_no_execute"))
            _repairs.append(self._glue)

    # -- running ------------------------------------------------------------------------------

    def run(self, on_exit: OnExit, budget: int = _NO_LIMIT) -> None:
        """Run the loaded world, calling `on_exit(code)` at each #VMEXIT until it returns `STOP`.

        After `budget` blocks of guest code there is an exit with `glue.EXIT_BUDGET`.  What
        `on_exit` raises comes out here.
        """
        self._on_exit = on_exit
        self._budget.value = budget
        status = self._start(self._handle, self.state.rip, 0, 0, 0)
        self.request_window(self._window)
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if status:
            raise SiliconDied(
                f"the processor stopped at rip {self.state.rip:#x}: "
                f"{library.api('uc_strerror')(status)}"
            )

    def _leave(self, code: int) -> int:
        """From the glue: a #VMEXIT.  No exception may cross the emulator's frames."""
        try:
            action = self._on_exit(code)
        except BaseException as error:
            self._error = error
            action = STOP
        if action == STOP:  # a window that stands would open again before the engine stops
            self._window = self.window_requested
            self.request_window(False)
        return action

    @property
    def blocks(self) -> int:
        """How many blocks of guest code have been entered: the deterministic clock."""
        return self._blocks.value

    def set_exit_cost(self, blocks: int) -> None:
        """Let the clock and the budget take every exit for as many blocks."""
        self._exit_cost.value = blocks

    def uncount_blocks(self, blocks: int) -> None:
        """Take back what an exit that nobody was to see has cost."""
        self._blocks.value -= blocks

    def forget_kick(self) -> None:
        """A kick that has done its work does not stop the next run."""
        self._kicked.value = 0

    @property
    def budget(self) -> int:
        """How many blocks are left until the next budget exit."""
        return self._budget.value

    def set_budget(self, blocks: int) -> None:
        """From `on_exit`: the next budget exit comes after `blocks` more blocks."""
        self._budget.value = blocks

    def step(self) -> None:
        """From `on_exit`: the next block is one instruction, or one iteration with REP.

        With a budget of 1 the exit comes behind it, or behind the delivery of the exception that
        it raises.  The guest's own trap flag has no part in it.
        """
        self.state.next_block_flags.value = layout.NEXT_BLOCK_ONE_INSTRUCTION

    def forget_step(self) -> None:
        """A step that another exit came before."""
        self.state.next_block_flags.value = layout.NEXT_BLOCK_AS_EVER

    def kick(self) -> None:
        """From any thread: a budget exit at the next block."""
        self._kicked.value = _KICK

    # -- state --------------------------------------------------------------------------------

    def load(self, vmcb: SiliconVmcb) -> None:
        """VMRUN's loading half: controls and state from the VMCB."""
        self._load_world(self._cpu, self._env, vmcb.pointer, vmcb.hpa)

    def save(self, vmcb: SiliconVmcb) -> None:
        """#VMEXIT's saving half: the running state to the VMCB."""
        self._save_world(self._env, vmcb.pointer)

    def enter_svm(self, host: SiliconVmcb, guest: SiliconVmcb, vmcb: SiliconVmcb) -> None:
        """VMRUN: save to `host`, take the guest state of `guest` into `vmcb`, load that.

        Made canonical, free of reserved bits and with the EFER.LMA and CPL that follow.
        """
        self._enter_svm(self._cpu, self._env, host.pointer, guest.pointer, vmcb.pointer, vmcb.hpa)

    def leave_svm(self, guest: SiliconVmcb, host: SiliconVmcb) -> None:
        """#VMEXIT: save to `guest`, load `host` with CR2 and DR6 as they are, breakpoints off."""
        self._leave_svm(self._cpu, self._env, guest.pointer, host.pointer, host.hpa)

    def load_extra(self, vmcb: SiliconVmcb) -> None:
        """What VMLOAD loads: FS, GS, TR, LDTR, KernelGsBase, STAR.., SYSENTER.. ."""
        self._load_extra(self._env, vmcb.pointer)

    def save_extra(self, vmcb: SiliconVmcb) -> None:
        """What VMSAVE saves."""
        self._save_extra(self._env, vmcb.pointer)

    def load_vmx(self, vmcb: SiliconVmcb) -> None:
        """What VMX transitions load: VMRUN's state, FS, GS, TR, LDTR and SYSENTER.. ."""
        self._load_vmx(self._cpu, self._env, vmcb.pointer, vmcb.hpa)

    def save_vmx(self, vmcb: SiliconVmcb) -> None:
        """What VMX transitions save."""
        self._save_vmx(self._env, vmcb.pointer)

    def instruction_bytes(self) -> bytes:
        """15 bytes at the exiting instruction, or none where the silicon did not have them.

        They are the first of `instruction`; its last byte is 0 where there are none.
        """
        data = self.instruction.raw
        return data[:15] if data[15] else b""

    def reset(self) -> None:
        """The whole state as it was when the processor was built."""
        self.unpark(self._initial)

    def park(self) -> bytes:
        """The whole state of the running vCPU, to be given back to `unpark`."""
        return bytes(self.state.bytes)

    def unpark(self, parked: bytes) -> None:
        """Make a parked vCPU the running one."""
        if len(parked) != STATE_SIZE:
            raise ValueError("not a parked state")
        self.state.bytes[:] = parked
        self.flush()

    # -- events -------------------------------------------------------------------------------

    def inject_exception(self, vector: int, error_code: int | None) -> int:
        """Prepare a hardware exception; the action to return from `on_exit`."""
        state = self.state
        state.exception_index.value = vector
        state.error_code = error_code or 0
        state.is_int = 0
        state.old_exception = vector if vector in _COMBINING else 0xFFFF_FFFF
        with_error = 0 if error_code is None else 1 << 11
        self._record(vector | _TYPE_EXCEPTION << 8 | with_error, error_code or 0)
        return DELIVER

    def inject_software(self, vector: int, length: int, kind: int = _TYPE_SOFTWARE) -> int:
        """Prepare INT n, INT3 or INTO of `length` bytes; the action to return from `on_exit`."""
        state = self.state
        state.exception_index.value = vector
        state.error_code = 0
        state.is_int = 1
        state.next_rip = state.rip + length
        if length:  # 0: the same event once more, after RIP was moved
            self.software = state.next_rip, length
        self._record(vector | kind << 8, 0)
        return DELIVER

    def inject_interrupt(self, vector: int) -> int:
        """Prepare an external interrupt; the action to return from `on_exit`."""
        self.state.exception_index.value = vector
        self._record(vector | _TYPE_EXTERNAL << 8, 0)
        return DELIVER_HARDWARE

    def inject_nmi(self) -> int:
        """Prepare an NMI; the action to return from `on_exit`."""
        self.state.exception_index.value = 2
        self._record(2 | _TYPE_NMI << 8, 0)
        return DELIVER_HARDWARE

    def _record(self, event: int, error_code: int) -> None:
        """EVENTINJ of the running VMCB: what an exit during delivery finds as EXITINTINFO."""
        vmcb = self.state.q[Env.VMCB // 8]
        self.memory.frames.set_u64(
            vmcb + VmcbField.EVENTINJ, error_code << 32 | event | _EVENT_VALID
        )

    def take_interrupted_event(self) -> int:
        """The event in whose delivery this exit happened, in EXITINTINFO form; 0 where none.

        Where an instruction asked for it (INT n, INT3, INTO), RIP is behind that instruction.
        """
        where = self.state.q[Env.VMCB // 8] + VmcbField.EVENTINJ
        event = self.memory.frames.u64(where)
        if not event & _EVENT_VALID:
            return 0
        self.memory.frames.set_u64(where, 0)
        return event

    @property
    def window_requested(self) -> bool:
        """Whether `request_window` stands."""
        return self._window

    def request_window(self, wanted: bool) -> None:
        """Ask for (or forget) an exit 0x64 as soon as the guest can take an interrupt."""
        if wanted == self._window:
            return
        self._window = wanted
        if wanted:
            self.state.interrupt_request.value |= layout.INTERRUPT_VIRTUAL
        else:
            self.state.interrupt_request.value &= ~layout.INTERRUPT_VIRTUAL

    # -- translation --------------------------------------------------------------------------

    def flush(self) -> None:
        """Drop every translation of the running world."""
        library.function("tlb_flush")(self.state.cpu)

    def flush_page(self, gva: int) -> None:
        """Drop the translation of one page."""
        library.function("tlb_flush_page")(self.state.cpu, gva)

    def invalidate_code(self, start: int, end: int) -> None:
        """Forget translated code of host-physical `start` to `end`."""
        library.function("tb_invalidate_phys_range")(self._handle, start, end)


_COMBINING = frozenset({0, 8, 10, 11, 12, 13, 14})

# The glue that the repaired library jumps to; it must outlive its processor.
_repairs: list[glue.Glue] = []


def _handle(engine: unicorn.Uc) -> int:
    handle = engine._uch
    return int(handle.value if hasattr(handle, "value") else handle)
