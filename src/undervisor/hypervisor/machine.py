"""The machine: memory, processors, platform and time; and the loop that runs it.

The loop is: silicon exit -> `Exit` -> (in L2: does L1 want it?) -> handler from a table ->
`Verdict`.  It runs inside the silicon's exit callback, so that going on costs next to nothing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from typing import Final

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.intercepts import intercept_mask
from undervisor.arch.x86.boot import BootState
from undervisor.arch.x86.cpuid import Vendor
from undervisor.arch.x86.events import EventType, Fault, GuestFault, combine
from undervisor.devices.clock import Clock
from undervisor.devices.ends import EndOfRun
from undervisor.devices.serial import Input
from undervisor.hypervisor import decode, events, intercepts
from undervisor.hypervisor.exit import DURING_DELIVERY, Exit
from undervisor.hypervisor.exits import EXITS
from undervisor.hypervisor.models import CpuModel
from undervisor.hypervisor.models.leaves import CpuidState
from undervisor.hypervisor.nested import GuestExit
from undervisor.hypervisor.nested.vendors import nested_for
from undervisor.hypervisor.nested_paging import NestedTables, identity
from undervisor.hypervisor.platform import Features, Platform
from undervisor.hypervisor.quirks import apply as apply_quirks
from undervisor.hypervisor.quirks import changed_model
from undervisor.hypervisor.quirks import named as quirks_named
from undervisor.hypervisor.trace import NO_TRACE, Tracer
from undervisor.hypervisor.vcpu import Activity, Vcpu
from undervisor.hypervisor.verdict import (
    RESUME,
    SWITCHED,
    Ending,
    Halt,
    Inject,
    Outcome,
    Resume,
    Stop,
    Switched,
    Verdict,
    Yield,
)
from undervisor.silicon.glue import EXIT_BUDGET
from undervisor.silicon.memory import Memory
from undervisor.silicon.processor import RESUME as RUN_ON
from undervisor.silicon.processor import STOP as LEAVE
from undervisor.silicon.processor import Processor, SiliconVmcb

MAX_CPUS: Final = 8

# The deterministic clock.  The TSC ticks once a nanosecond; a block of guest code is a few
# instructions, and an exit costs a guest about a microsecond, as on silicon.
BLOCK_NS: Final = 8
EXIT_NS: Final = 1000
SLICE_BLOCKS: Final = 20_000
LONGEST_SLICE: Final = 2_000_000
_FOREVER: Final = 1 << 62
_SECOND: Final = 1_000_000_000
_OF_A_FETCH: Final = (ExitCode.NPF, ExitCode.EXCP_PF)
_EXITS_BETWEEN_LOOKS: Final = 61  # at the host's clock; a prime, as guests' exits come in rhythms

ROM: Final = ((0xC0000, 0x100000),)

_L1_INTERCEPTS: Final = intercept_mask(*intercepts.L1)

Suspended = tuple[int, bool, tuple[int, int, int], tuple[int, int], int]
"""What a stopped run still has to do: action, interrupt window, prepared event, budget."""


class Machine:
    """A PC for L1: RAM, one to eight processors of one model, a platform, virtual time.

    `run` runs it until something ends the run.  It can be run again after a stop of the caller's
    own (`request_stop`).
    """

    def __init__(
        self,
        model: CpuModel,
        *,
        memory_size: int = 256 << 20,
        cpus: int = 1,
        command_line: str = "",
        serial: Callable[[bytes], None] = lambda data: None,
        source: Input | None = None,
        console: Callable[[bytes], None] | None = None,
        tracer: Tracer = NO_TRACE,
        quirks: Iterable[str] = (),
    ) -> None:
        if not 1 <= cpus <= MAX_CPUS:
            raise ValueError(f"{cpus} processors: 1 to {MAX_CPUS} are possible")
        self.quirks = quirks_named(quirks)
        self.model = model = changed_model(model, self.quirks)
        self.tracer = tracer
        self.memory = Memory(memory_size)
        self.processor = Processor(self.memory, intel=model.vendor is Vendor.INTEL)
        self.processor.set_exit_cost(EXIT_NS // BLOCK_NS)
        self.exit_cost = EXIT_NS
        self.npt01 = identity(self.memory, ROM)
        self.clock = Clock(self.now)
        self._exits = 0
        self._skipped = 0
        self._slice_end = 0
        self._slice_over = False
        self._armings = 0
        self._wall_limit = 1.0 * _FOREVER
        self._outcome: Outcome | None = None
        self._look = self._looks_first = False
        self._suspended: Suspended | None = None
        self._step_blocks = 0
        self._stepping = False
        self._random = random.Random(0)
        self.vcpus = [Vcpu(self, index) for index in range(cpus)]
        self.platform = Platform(
            self.clock,
            self.vcpus,
            self.memory,
            memory_size,
            serial_sink=serial,
            on_end=self._guest_ended,
            console_sink=console,
            source=source,
            command_line=command_line,
            features=Features(
                x2apic=model.has("x2apic"),
                tsc_deadline=model.has("tsc-deadline"),
                physical_address_bits=model.physical_width,
                signature=model.cpuid(1, 0, CpuidState())[0],
            ),
        )
        for gpa, data in self.platform.tables():
            self.memory.write(gpa, data)
        for vcpu, lapic in zip(self.vcpus, self.platform.lapics, strict=True):
            vcpu.lapic = lapic
            vcpu.exit = Exit(vcpu)
            for vmcb in (vcpu.vmcb01, vcpu.vmcb02):
                self._prepare(vmcb)
            vcpu.nested = nested_for(vcpu)
            vcpu.l1_handlers = {**EXITS, **vcpu.nested.l1_exits}
            vcpu.l2_handlers = {**EXITS, **vcpu.nested.l2_exits}
        self.current = self.vcpus[0]
        apply_quirks(self, self.quirks)

    def _prepare(self, vmcb: SiliconVmcb) -> None:
        """The controls of L1's VMCB; L2's begins like it, and gets other intercepts and tables."""
        vmcb.b[0:24] = b"".join(word.to_bytes(4, "little") for word in _L1_INTERCEPTS)
        vmcb.n_cr3 = self.npt01.root
        vmcb.nested_control = 1
        vmcb.guest_asid = 1
        vmcb.msrpm_base_pa = self._all_msrs()

    def _all_msrs(self) -> int:
        """An MSR permission map that intercepts every access; two contiguous private pages."""
        if not hasattr(self, "_msrpm"):
            first, second = self.memory.frames.allocate(), self.memory.frames.allocate()
            assert second == first + 4096, "private frames come in order at start-up"
            for frame in (first, second):
                self.memory.frames.view(frame)[:] = b"\xff" * 4096
            self._msrpm = first
        return self._msrpm

    # -- time ----------------------------------------------------------------------------------

    def now(self) -> int:
        """Virtual time in nanoseconds since power-on; the TSC before offsets."""
        return self.processor.blocks * BLOCK_NS + self._skipped

    @property
    def exits(self) -> int:
        """How many exits there have been."""
        return self._exits

    # -- running -------------------------------------------------------------------------------

    def boot(self, boot: BootState) -> None:
        """Put the first processor at the start of an image; the others wait for SIPI."""
        for vcpu in reversed(self.vcpus):
            vcpu.start(boot) if vcpu.index == 0 else self._park_waiting(vcpu)
        self.current = self.vcpus[0]
        self._suspended = None

    def _park_waiting(self, vcpu: Vcpu) -> None:
        self.processor.reset()
        vcpu.reset()
        self.processor.load(vcpu.vmcb01)
        self.processor.load_extra(vcpu.vmcb01)
        vcpu.activity = Activity.WAIT_FOR_SIPI
        vcpu.parked = self.processor.park()

    def run(self, timeout: float | None = None) -> Outcome:
        """Run until the guest ends, dies, idles for ever, or `timeout` seconds have passed."""
        self._outcome = None
        self._wall_limit = time.monotonic() + (_FOREVER if timeout is None else timeout)
        if self._suspended is not None:  # go on exactly where `request_stop` left
            self.processor.request_window(False)
            self.processor.forget_kick()
            self.processor.run(self._continue, 0)
        else:
            self._slice_end = self.processor.blocks + SLICE_BLOCKS
        while self._outcome is None:
            self.processor.run(self._on_exit, self._budget())
        self.platform.flush()
        return self._outcome

    def request_stop(self, outcome: Outcome | None = None) -> None:
        """End the run at the next exit; from a device, a tracer or another thread."""
        if self._outcome is None:
            self._end(outcome or Outcome(Ending.STOPPED, "stopped by the caller"))
        self.processor.kick()

    @property
    def is_stopping(self) -> bool:
        """Whether the run ends at the next exit."""
        return self._outcome is not None

    def switch_to(self, vcpu: Vcpu) -> None:
        """Between runs: make a processor the current one, to look at it."""
        if vcpu is not self.current:
            self._switch(self.current, vcpu)

    def _guest_ended(self, end: EndOfRun) -> None:
        text = f"the guest ended the run: {end.reason.value}"
        self._end(Outcome(Ending.GUEST, text, end.status))

    def _on_exit(self, code: int) -> int:
        """One #VMEXIT of the silicon; the action to go on with."""
        self._exits += 1
        vcpu = self.current
        exit = vcpu.exit
        exit.code = code
        exit.event = exit.take_event() if code in DURING_DELIVERY else 0
        if self._looks_first and self._is_too_early(exit):
            verdict: Verdict = RESUME
        elif self.tracer.wants:
            verdict = self._traced(vcpu, exit)
        else:
            verdict = self._decide(vcpu, exit)
        if verdict.__class__ is Resume and verdict.advance:
            action = vcpu.advance(verdict.advance)
        elif verdict is SWITCHED:
            action = RUN_ON
        else:
            action = self._apply(vcpu, exit, verdict)
        if vcpu.step is not None:
            self._judge_step(vcpu, exit, action)
        elif action == RUN_ON and not self._something_new(vcpu):
            return RUN_ON  # the budget that was set still says when to look again
        if not self._exits % _EXITS_BETWEEN_LOOKS:  # what sets new budgets may never use one up
            self.look_outside()
        if self._outcome is not None:
            return self._suspend(action)
        return self._go_on(action)

    def _go_on(self, action: int) -> int:
        """Look at what waits, then back to the guest; the silicon's action."""
        if action == RUN_ON:
            action = self._attend(self.current)
            if action == LEAVE:
                return self._suspend(RUN_ON)
        # What else waits is looked at before the first instruction of a delivered event's handler.
        self._looks_first = action != RUN_ON and self.current.attention
        self.processor.set_budget(0 if self._looks_first else self._budget())
        return action

    def _is_too_early(self, exit: Exit) -> bool:
        """Whether a handler's first fetch faulted, before which something must be looked at.

        The budget ends at the handler's block; a fault of its fetch comes earlier, and will again.
        """
        self._looks_first = False
        if exit.code not in _OF_A_FETCH or exit.event:
            return False
        self._exits -= 1  # it did not happen, and took no time
        self.processor.uncount_blocks(EXIT_NS // BLOCK_NS)
        return True

    def _traced(self, vcpu: Vcpu, exit: Exit) -> Verdict:
        before = self.tracer.before(vcpu, exit)
        verdict = self._decide(vcpu, exit)
        self.tracer.after(vcpu, exit, before, verdict)
        return verdict

    def _something_new(self, vcpu: Vcpu) -> bool:
        """Whether the loop must look at more than the exit that it has just handled."""
        return vcpu.attention or self._look or self.clock.armings != self._armings

    def step_block(self) -> None:
        """Look again after one block: an instruction that ends one, or the end of a shadow."""
        self._step_blocks, self._look = 1, True

    def _end(self, outcome: Outcome) -> None:
        self._outcome, self._look = outcome, True

    def _suspend(self, action: int) -> int:
        """The run ends here; should it be continued, `action` is what is still to be done."""
        state, processor = self.processor.state, self.processor
        self._suspended = (
            action if action != LEAVE else RUN_ON,
            processor.window_requested,
            (state.exception_index.value, state.error_code, state.is_int),
            (state.next_rip, state.old_exception),
            processor.budget,
        )
        return LEAVE

    def _continue(self, code: int) -> int:
        """The first exit of a continued run, before its first instruction; then as ever."""
        if self._suspended is None:
            return self._on_exit(code)
        action, window, (index, error, is_int), (next_rip, old), budget = self._suspended
        self._suspended = None
        # Else the fetch faulted, and will do so again: no block has been entered.
        entered = 1 if code == EXIT_BUDGET else 0
        self.processor.uncount_blocks(EXIT_NS // BLOCK_NS + entered)
        self.processor.request_window(window)
        state = self.processor.state
        state.exception_index.value, state.error_code, state.is_int = index, error, is_int
        state.next_rip, state.old_exception = next_rip, old
        quiet = self.current.step is None and not self._something_new(self.current)
        if action == RUN_ON and quiet:
            self.processor.set_budget(budget)
            return RUN_ON
        return self._go_on(action)

    def _decide(self, vcpu: Vcpu, exit: Exit) -> Verdict:
        """Who handles the exit, and what is to be done."""
        try:
            if vcpu.in_l2:
                verdict = vcpu.nested.reflect(vcpu, exit)
                if verdict is not None:
                    return verdict
                handler = vcpu.l2_handlers.get(exit.code)
            else:
                handler = vcpu.l1_handlers.get(exit.code)
            if handler is None:
                return _unknown(vcpu, exit)
            return handler(vcpu, exit)
        except GuestFault as fault:
            return Inject(fault.fault)
        except GuestExit as left:
            return left.verdict

    def _apply(self, vcpu: Vcpu, exit: Exit, verdict: Verdict) -> int:
        """Carry out a verdict; the silicon's action."""
        kind = verdict.__class__
        if kind is Resume:
            if verdict.advance:  # type: ignore[union-attr]
                return vcpu.advance(verdict.advance)  # type: ignore[union-attr]
            return self._redeliver(vcpu, exit.event) if exit.event else RUN_ON
        if isinstance(verdict, Switched):
            return verdict.deliver
        if isinstance(verdict, Inject):
            return self._inject(vcpu, exit, verdict.fault)
        if isinstance(verdict, Halt):
            action = vcpu.advance(verdict.advance)
            vcpu.activity = Activity.HALTED
            vcpu.attention = True
            return action
        if isinstance(verdict, Yield):
            self._slice_over = self._look = True
            return vcpu.advance(verdict.advance)
        assert isinstance(verdict, Stop)
        self._end(verdict.outcome)
        return LEAVE

    def _inject(self, vcpu: Vcpu, exit: Exit, fault: Fault) -> int:
        """Deliver a fault, combined with the event in whose delivery it happened."""
        if vcpu.in_l2:  # the second exception is looked at before it becomes a double fault
            reflected = vcpu.nested.reflect_fault(vcpu, exit, fault)
            if reflected is not None:
                return self._apply(vcpu, exit, reflected)
        if exit.event:
            combined = combine(exit.event & 0xFF, fault, exit.event >> 8 & 7)
            if combined is None:
                return self._apply(vcpu, exit, self._decide_shutdown(vcpu, exit))
            if vcpu.in_l2 and combined is not fault:
                reflected = vcpu.nested.reflect_fault(vcpu, exit, combined)
                if reflected is not None:
                    return self._apply(vcpu, exit, reflected)
            fault = combined
        return vcpu.inject(fault)

    def raise_trap(self, vcpu: Vcpu, fault: Fault) -> int:
        """An instruction that L0 completed ends in a trap; the silicon's action."""
        exit = vcpu.exit
        exit.event = 0
        return self._inject(vcpu, exit, fault)

    def _decide_shutdown(self, vcpu: Vcpu, exit: Exit) -> Verdict:
        exit.code, exit.event = ExitCode.SHUTDOWN, 0
        return self._decide(vcpu, exit)

    def _redeliver(self, vcpu: Vcpu, event: int) -> int:
        """L0 has repaired what interrupted an event's delivery: deliver it again."""
        vector, kind = event & 0xFF, event >> 8 & 7
        processor = vcpu.processor
        if kind == EventType.EXTERNAL_INTERRUPT:
            return processor.inject_interrupt(vector)
        if kind == EventType.NMI:
            return processor.inject_nmi()
        if kind == EventType.EXCEPTION and not vcpu.state.is_int:
            return processor.inject_exception(vector, event >> 32 if event & 0x800 else None)
        return processor.inject_software(
            vector, vcpu.state.next_rip - vcpu.state.rip, EventType(kind)
        )

    def note(self, vcpu: Vcpu, verdict: Verdict) -> None:
        """Tell the tracer of a world switch that no exit of the silicon caused."""
        if self.tracer.wants:
            self.tracer.after(vcpu, vcpu.exit, None, verdict)

    def stop_with(self, verdict: Verdict) -> int:
        """Carry out a verdict that ends the run; the silicon's action."""
        assert isinstance(verdict, Stop)
        self._end(verdict.outcome)
        return LEAVE

    def _judge_step(self, vcpu: Vcpu, exit: Exit, action: int) -> None:
        """Whether the instruction that is stepped over is behind the guest now.

        A budget exit comes at the entry of a block, which has been counted: the step's own block
        or a delivery lies before it, unless somebody kicked the processor.
        """
        step, q = vcpu.step, vcpu.state.q
        assert step is not None
        passed = self.processor.blocks - EXIT_NS // BLOCK_NS - step.blocks
        ran = exit.code == EXIT_BUDGET and passed > 1
        if ran and q[16] == step.rip and q[1] != step.count:
            # The silicon finds out only at the next pass that REP's last iteration is over.
            decoded = decode.instruction(vcpu)
            if decode.is_string(decoded) and not q[1] & decode.string_address_mask(vcpu, decoded):
                ran, step.count = False, q[1]
        if ran or action != RUN_ON or q[16] != step.rip or q[1] != step.count:
            vcpu.end_step()

    # -- scheduling ----------------------------------------------------------------------------

    def _attend(self, vcpu: Vcpu) -> int:
        """Timers, pending events and the other processors; the silicon's action."""
        deadline = self.clock.next_deadline()
        if deadline is not None and deadline <= self.now():
            self.clock.run_due()
        if vcpu.in_l2:
            self._due(vcpu)
        while True:
            if vcpu.attention or vcpu.activity is not Activity.ACTIVE:
                action = events.deliver(vcpu)
                if self._outcome is not None:
                    return LEAVE
                if action != RUN_ON:
                    return action
            slice_over = self._slice_over or self.processor.blocks >= self._slice_end
            if vcpu.activity is Activity.ACTIVE and not slice_over:
                return RUN_ON
            following = self._next_vcpu(vcpu)
            if following is None:
                return LEAVE
            self._slice_over = False
            self._slice_end = self.processor.blocks + SLICE_BLOCKS
            if following is not vcpu:
                self._switch(vcpu, following)
                vcpu = following
                vcpu.attention = True

    def _next_vcpu(self, vcpu: Vcpu) -> Vcpu | None:
        """The next processor in turn that can run, letting time pass where none can."""
        count = len(self.vcpus)
        while self._outcome is None:
            for step in range(1, count + 1):
                candidate = self.vcpus[(vcpu.index + step) % count]
                if candidate.activity is Activity.ACTIVE or self._can_wake(candidate):
                    return candidate
            if not self._let_time_pass():
                self.look_outside()
                if self._outcome is not None:
                    break
                text = "every processor waits for an event that cannot come"
                self._end(Outcome(Ending.IDLE, text))
        return None

    def _can_wake(self, vcpu: Vcpu) -> bool:
        """Whether a waiting processor, running or parked, has something to do."""
        if not vcpu.attention and not (vcpu.in_l2 and self._due(vcpu)):
            return False
        if vcpu is self.current:
            return events.can_wake(vcpu)
        return True  # it looks for itself when it is switched to

    def _due(self, vcpu: Vcpu) -> bool:
        own = vcpu.nested.deadline()
        if own is not None and own <= self.now():
            vcpu.attention = True
            return True
        return False

    def _let_time_pass(self) -> bool:
        """Skip to the next timer; False where nothing will ever happen."""
        waiting = [self.clock.next_deadline()]
        waiting += [v.nested.deadline() for v in self.vcpus if v.in_l2]
        deadlines = [deadline for deadline in waiting if deadline is not None]
        if not deadlines:
            return self.platform.take_input()
        self.look_outside()
        left = max(0, min(deadlines) - self.now())
        # Who types lives in real time: an idle guest that listens must not be hours ahead.
        if self.platform.take_input(left / _SECOND):
            return True
        self._skipped += left
        self.clock.run_due()
        return True

    def _switch(self, old: Vcpu, new: Vcpu) -> None:
        """Put another processor on the silicon."""
        old.window_wanted = self.processor.window_requested
        old.parked = self.processor.park()
        assert new.parked is not None
        self.processor.unpark(new.parked)
        self.processor.request_window(new.window_wanted)
        self.current = new

    def _budget(self) -> int:
        """Blocks until the loop must look again."""
        self._armings = self.clock.armings
        self._look = False
        step = self.current.step
        if step is not None:
            step.blocks = self.processor.blocks
            self._stepping = True
            self.processor.step()
            return 1
        if self._stepping:
            self._stepping = False
            self.processor.forget_step()
        if self._step_blocks:
            blocks, self._step_blocks = self._step_blocks, 0
            return blocks
        limit = LONGEST_SLICE
        if len(self.vcpus) > 1:
            limit = self._slice_end - self.processor.blocks
        deadline = self.clock.next_deadline()
        if self.current.in_l2:
            own = self.current.nested.deadline()
            if own is not None and (deadline is None or own < deadline):
                deadline = own
        if deadline is not None:
            limit = min(limit, (deadline - self.now()) // BLOCK_NS)
        return limit if limit > 0 else 0

    def identity_tables(self) -> NestedTables:
        """New tables like L1's own, for a change that L1 must not feel."""
        return identity(self.memory, ROM)

    def is_rom(self, gpa: int) -> bool:
        """Whether a guest-physical address is ROM."""
        return any(start <= gpa < end for start, end in ROM)

    def random(self) -> int:
        """The next 64 bits of the machine's random numbers, the same in every run."""
        return self._random.getrandbits(64)

    def look_outside(self) -> None:
        """At the end of each slice, and every so many exits: output, input, and the time limit."""
        self.platform.take_input(0)
        if self._outcome is None and time.monotonic() > self._wall_limit:
            self._end(_timed_out())


def _timed_out() -> Outcome:
    return Outcome(Ending.TIMEOUT, "the time limit has passed")


def _unknown(vcpu: Vcpu, exit: Exit) -> Stop:
    text = f"{exit.name} at rip {vcpu.state.rip:#x}: no handler for this exit"
    return Stop(Outcome(Ending.UNKNOWN_EXIT, text))
