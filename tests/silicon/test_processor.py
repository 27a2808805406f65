"""The processor: worlds in and out, exits, events, budgets, kicks and coherence."""

import itertools
import struct
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import (
    CODE,
    CPUID,
    DATA,
    GDT,
    HANDLERS,
    HLT,
    IDT,
    NPF,
    PDPT,
    PML4,
    SHUTDOWN,
    STACK,
    TSS,
    Silicon,
)

from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import VmcbField
from undervisor.arch.x86.segments import Gate, Segment, SystemType
from undervisor.silicon import glue, library
from undervisor.silicon.layout import Env, Hflags
from undervisor.silicon.processor import (
    RESUME,
    STOP,
    Processor,
    SiliconVmcb,
)

_VM_HSAVE = 4832  # where the emulator keeps VM_HSAVE_PA


@pytest.fixture
def silicon():
    return Silicon()


@pytest.fixture(scope="module")
def shared():
    return Silicon()


# -- worlds ------------------------------------------------------------------------------------

U64, U32, U16 = (st.integers(0, (1 << bits) - 1) for bits in (64, 32, 16))
SCALARS = {
    "cr2": U64, "cr3": U64, "dr6": U64, "dr7": U64, "rip": U64, "rsp": U64, "rax": U64,
    "gdtr_base": U64, "idtr_base": U64, "gdtr_limit": U32, "idtr_limit": U32,
    "kernel_gs_base": U64, "star": U64, "lstar": U64, "cstar": U64, "sfmask": U64,
    "sysenter_cs": U32, "sysenter_esp": U64, "sysenter_eip": U64,
    "cr0": U64, "cr4": U64, "efer": U64,
    "rflags": st.integers(0, 0x3FFFFF).map(lambda v: v & 0x3F7FD7 | 2),
    "cpl": st.integers(0, 3), "interrupt_shadow": st.integers(0, 1),
}  # fmt: skip
SEGMENTS = [VmcbField[f"{n}_SELECTOR"] for n in ["ES", "CS", "SS", "DS", "FS", "GS", "TR", "LDTR"]]
SEGMENT = st.builds(Segment, U16, U64, U32, st.integers(0, 0xFFF))
STATES = st.tuples(st.fixed_dictionaries(SCALARS), st.tuples(*[SEGMENT] * len(SEGMENTS)))


@settings(max_examples=60, deadline=None)
@given(STATES)
def test_a_world_that_is_loaded_and_saved_is_unchanged(shared, drawn):
    scalars, segments = drawn
    there, back = _vmcbs(shared)
    for name, value in scalars.items():
        setattr(there, name, value)
    for field, segment in zip(SEGMENTS, segments, strict=True):
        there.set_segment(field, segment)
    shared.enter(there)
    shared.processor.save(back)
    shared.processor.save_extra(back)
    assert {name: getattr(back, name) for name in scalars} == scalars
    assert tuple(back.segment(field) for field in SEGMENTS) == segments


def _vmcbs(silicon):
    """Two VMCBs, the same ones for every example."""
    if not hasattr(silicon, "pair"):
        silicon.pair = silicon.vmcb(), SiliconVmcb(silicon.memory)
    return silicon.pair


@settings(max_examples=60, deadline=None)
@given(STATES)
def test_what_vmx_transitions_move_goes_there_and_back(shared, drawn):
    scalars, segments = drawn
    there, back = _vmcbs(shared)
    for name, value in scalars.items():
        setattr(there, name, value)
    for field, segment in zip(SEGMENTS, segments, strict=True):
        there.set_segment(field, segment)
    shared.processor.load_vmx(there)
    shared.processor.save_vmx(back)
    assert tuple(back.segment(field) for field in SEGMENTS) == segments
    moved = scalars.keys() - {"kernel_gs_base", "star", "lstar", "cstar", "sfmask"}
    assert {name: getattr(back, name) for name in moved} == {n: scalars[n] for n in moved}


MODES = {
    # CR0, CR4, EFER, RFLAGS, CS attributes, SS attributes, a data base
    "real": (0x10, 0, 0x1000, 2, 0x9B, 0x93, 0x1230),
    "real with zero bases": (0x10, 0, 0x1000, 2, 0x9B, 0x93, 0),
    "virtual-8086": (0x11, 0, 0x1000, 0x20002, 0xFB, 0xF3, 0x1230),
    "16-bit protected": (0x11, 0, 0x1000, 2, 0x9B, 0x93, 0x1230),
    "32-bit protected": (0x11, 0, 0x1000, 2, 0xC9B, 0xC93, 0),
    "32-bit protected with bases": (0x11, 0x200, 0x1000, 2, 0xC9B, 0xC93, 0x5000),
    "32-bit code, 16-bit stack": (0x3F, 0, 0x1000, 2, 0xC9B, 0x893, 0),
    "32-bit paging": (0x80000011, 0x10, 0x1000, 0x202, 0xC9B, 0xC93, 0),
    "PAE": (0x80000011, 0x20, 0x1800, 2, 0xC9B, 0xC93, 0),
    "compatibility": (0x80000011, 0x620, 0x1D00, 2, 0xC9B, 0xC93, 0x5000),
    "64-bit": (0x80050033, 0x300620, 0x1D01, 0x40202, 0xA9B, 0xC93, 0x5000),
    "64-bit with TS": (0x8001003B, 0x620, 0x1D01, 0x102, 0xA9B, 0xC93, 0),
}


@pytest.mark.parametrize(
    ("mode", "cpl", "shadow"),
    [
        (mode, cpl, shadow)
        for mode, cpl, shadow in itertools.product(MODES, (0, 3), (0, 1))
        if cpl == 3 or mode != "virtual-8086"
    ],
)
def test_the_cached_flags_are_those_that_the_emulators_own_vmrun_computes(
    shared, mode, cpl, shadow
):
    cr0, cr4, efer, rflags, cs, ss, base = MODES[mode]
    vmcb, _ = _vmcbs(shared)
    vmcb.b[0x400:0x700] = bytes(0x300)
    vmcb.cr0, vmcb.cr4, vmcb.efer, vmcb.rflags = cr0, cr4, efer, rflags
    vmcb.cpl, vmcb.interrupt_shadow, vmcb.rip = cpl, shadow, CODE
    data = Segment(0x10, base, 0xFFFFFFFF, 0xC93)
    vmcb.set_segment(VmcbField.CS_SELECTOR, Segment(8, 0, 0xFFFFFFFF, cs | cpl << 5))
    vmcb.set_segment(VmcbField.SS_SELECTOR, Segment(0x10, base, 0xFFFFFFFF, ss | cpl << 5))
    for name in ("DS", "ES"):
        vmcb.set_segment(VmcbField[f"{name}_SELECTOR"], data)
    state, parked = shared.state, shared.processor.park()
    try:
        shared.processor.load(vmcb)
        ours = state.hflags
        shared.processor.reset()
        state.cr4 = 0x20  # else VMRUN there gives up half-way on a guest in long mode
        state.q[0] = vmcb.hpa
        host = shared.memory.frames.allocate()
        struct.pack_into("<Q", state.bytes, _VM_HSAVE, host)
        library.function("helper_vmrun")(state.env, 2, 0)
        theirs = state.hflags
        shared.memory.frames.release(host)
    finally:
        shared.processor.unpark(parked)
    assert ours == theirs | shadow << Hflags.INTERRUPT_SHADOW  # which VMRUN there forgets


# -- exits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("cpuid", CPUID),
        ("hlt", HLT),
        ("vmrun", 0x80),
        ("vmmcall", 0x81),
        ("ud2", 0x46),
        ("mov ecx, 0x1b; here: rdmsr", 0x7C),
        ("in al, 0x40", glue.EXIT_IOIO),
        ("out 0x40, eax", glue.EXIT_IOIO),
        ("mov edx, 0x40; mov esi, 0x8000; here: outsb", glue.EXIT_IOIO),
        ("syscall", glue.EXIT_SYSCALL),
        ("mov rax, cr4; bts rax, 18; mov cr4, rax; here: xsetbv", glue.EXIT_XSETBV),
        ("mov eax, 0x30; here: ltr ax", glue.EXIT_LTR),
        ("mov esi, 0x40000000; here: mov eax, [rsi]", 0x4E),
    ],
)
def test_an_exit_comes_before_its_instruction(silicon, text, code):
    if "here" not in text:
        text = "here: " + text
    silicon.memory.write(GDT + 0x30, Segment(0, TSS, 0x67, 0x89).system_descriptor())
    vmcb = silicon.long_mode(Intercept.EXCP_PF)
    vmcb.gdtr_limit = 0x3F
    labels = silicon.code(text.replace("vmrun", "vmrun rax"))
    assert silicon.run(vmcb) == [code]
    assert silicon.state.rip == labels["here"]


@pytest.mark.parametrize(
    ("text", "information"),
    [
        ("in al, 0x40", 0x400011),
        ("in ax, 0x41", 0x410021),
        ("in eax, 0x42", 0x420041),
        ("out 0x43, al", 0x430010),
        ("mov edx, 0xfffe; out dx, ax", 0xFFFE0020),
        ("mov edx, 0x3f8; out dx, eax", 0x3F80040),
        ("mov edx, 0x3f8; mov edi, 0x8000; insb", 0x3F80011),
        ("mov edx, 0x3f8; mov esi, 0x8000; rep outsd", 0x3F80040),
    ],
)
def test_a_port_exit_has_the_port_the_size_and_the_direction(silicon, text, information):
    silicon.run_text("mov ecx, 1;" + text)
    assert silicon.state.error_code == information


def test_rdrand_and_rdseed_are_undefined(silicon):
    assert silicon.run_text("rdrand rax") == [0x46]
    assert silicon.run_text("rdseed rax") == [0x46]


def test_the_instruction_bytes_are_those_in_memory(silicon):
    silicon.run_text("nop; cpuid; nop; .fill 20, 1, 0xcc")
    data = silicon.processor.instruction_bytes()
    assert data == silicon.memory.read(CODE + 1, 15)


def test_instruction_bytes_are_given_only_where_none_can_be_missing(silicon):
    vmcb = silicon.long_mode()
    where = CODE + 0x1000 - 4
    silicon.code("cpuid", where)
    vmcb.rip = where
    silicon.run(vmcb)
    assert silicon.processor.instruction_bytes() == b""


def test_instruction_bytes_follow_the_segments_base(silicon):
    vmcb = silicon.vmcb()
    silicon.code("nop; cpuid", 0x12340, bits=16)
    vmcb.cr0, vmcb.efer, vmcb.rip, vmcb.rflags = 0x10, 0x1000, 0x340, 2
    vmcb.set_segment(VmcbField.CS_SELECTOR, Segment(0x1200, 0x12000, 0xFFFF, 0x9B))
    assert silicon.run(vmcb) == [CPUID]
    assert silicon.processor.instruction_bytes()[:2] == b"\x0f\xa2"


def test_a_triple_fault_is_a_shutdown(silicon):
    vmcb = silicon.long_mode()
    vmcb.idtr_limit = 0
    silicon.code("int3")
    assert silicon.run(vmcb) == [SHUTDOWN]


def test_what_the_exit_handler_raises_comes_out_of_run(silicon):
    def fail(code):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        silicon.run_text("cpuid", on_exit=fail)
    assert silicon.run_text("hlt") == [HLT]  # and the processor is as good as before


def test_a_handler_may_move_on_and_go_on(silicon):
    def skip(code):
        if code == HLT:
            return STOP
        silicon.state.q[0] = 77
        silicon.state.rip += 2
        return RESUME

    assert silicon.run_text("cpuid; mov ebx, eax; hlt", on_exit=skip) == [CPUID, HLT]
    assert silicon.state.q[3] == 77


# -- nested paging -----------------------------------------------------------------------------


def test_a_nested_fault_says_where_and_how(silicon):
    silicon = Silicon(nested_entries={0x200000: 0, 0x201000: 0x201005})
    for text, error in (("mov eax, [rsi]", 4), ("mov [rsi], eax", 6), ("jmp rsi", 0x14)):
        assert silicon.run_text("mov esi, 0x200123;" + text) == [NPF]
        assert silicon.state.error_code == error
        vmcb = silicon.state.q[Env.VMCB // 8]
        assert silicon.memory.frames.u64(vmcb + VmcbField.EXITINFO2) == 0x200123
    assert silicon.run_text("mov esi, 0x201000; mov [rsi], eax") == [NPF]
    assert silicon.state.error_code == 7


def test_no_execute_over_a_page_table_does_not_crash():
    """The repaired walk: pages that hold the guest's tables may be non-executable."""
    special = {page: page | 7 | 1 << 63 for page in (PML4, PDPT, DATA)}
    silicon = Silicon(nested_entries=special)
    silicon.run_text(f"mov eax, [{DATA:#x}]; mov ebx, 5; hlt")
    assert silicon.exits == [HLT]
    assert silicon.state.q[3] == 5


def test_no_execute_refuses_a_fetch_and_only_that():
    silicon = Silicon(nested_entries={0x200000: 0x200007 | 1 << 63})
    assert silicon.run_text("mov esi, 0x200000; mov [rsi], eax; mov eax, [rsi]; hlt") == [HLT]
    assert silicon.run_text("mov esi, 0x200000; jmp rsi") == [NPF]
    assert silicon.state.error_code == 0x15


# -- events ------------------------------------------------------------------------------------

FRAME = 40


def deliver(silicon, prepare):
    """Inject at a CPUID what `prepare` makes; the exits up to the next."""

    def on_exit(code):
        return prepare(silicon.processor) if len(silicon.exits) == 1 else STOP

    return silicon.run_text("cpuid; nop; hlt", on_exit=on_exit)


@pytest.mark.parametrize(
    ("prepare", "vector", "size", "advance"),
    [
        (lambda p: p.inject_exception(13, 0x58), 13, FRAME + 8, 0),
        (lambda p: p.inject_exception(0, None), 0, FRAME, 0),
        (lambda p: p.inject_exception(14, 7), 14, FRAME + 8, 0),
        (lambda p: p.inject_software(0x80, 2), 0x80, FRAME, 2),
        (lambda p: p.inject_software(3, 1, kind=6), 3, FRAME, 1),
        (lambda p: p.inject_interrupt(0x31), 0x31, FRAME, 0),
        (lambda p: p.inject_interrupt(13), 13, FRAME, 0),
        (lambda p: p.inject_nmi(), 2, FRAME, 0),
    ],
)
def test_an_injected_event_arrives_with_its_frame(silicon, prepare, vector, size, advance):
    silicon.code("hlt", HANDLERS + 16 * vector)
    assert deliver(silicon, prepare) == [CPUID, HLT]
    assert silicon.state.rip == HANDLERS + 16 * vector
    assert silicon.state.q[4] == STACK - size
    frame = silicon.memory.read(STACK - size, size)
    assert struct.unpack_from("<Q", frame, size - 40)[0] == CODE + advance
    if size > FRAME:
        assert struct.unpack_from("<Q", frame)[0] in (0x58, 7)


@pytest.mark.parametrize(
    ("prepare", "event", "advance"),
    [
        (lambda p: p.inject_exception(13, 0x58), 0x58_8000_0B0D, 0),
        (lambda p: p.inject_exception(6, None), 0x8000_0306, 0),
        (lambda p: p.inject_software(0x80, 2), 0x8000_0480, 2),
        (lambda p: p.inject_software(3, 1, kind=6), 0x8000_0603, 1),
        (lambda p: p.inject_interrupt(0x31), 0x8000_0031, 0),
        (lambda p: p.inject_nmi(), 0x8000_0202, 0),
    ],
)
def test_an_exit_during_delivery_tells_which_event_it_interrupted(prepare, event, advance):
    silicon = Silicon(nested_entries={IDT: 0})
    assert deliver(silicon, prepare) == [CPUID, NPF]
    assert silicon.processor.take_interrupted_event() == event
    assert silicon.processor.take_interrupted_event() == 0
    assert silicon.state.rip == CODE + advance  # behind an instruction that asked for its event


def test_an_exit_after_a_delivery_tells_of_no_event(silicon):
    silicon.code("cpuid", HANDLERS + 16 * 6)
    assert deliver(silicon, lambda p: p.inject_exception(6, None)) == [CPUID, CPUID]
    assert silicon.processor.take_interrupted_event() == 0


def test_an_event_of_the_guests_own_is_told_when_its_delivery_exits():
    silicon = Silicon(nested_entries={IDT: 0})
    assert silicon.run_text("xor ecx, ecx; div ecx") == [NPF]
    assert silicon.processor.take_interrupted_event() == 0x8000_0300


@pytest.mark.parametrize("software", [True, False])
def test_a_bad_gate_gives_8_times_its_vector_and_ext_unless_software_asked(silicon, software):
    silicon.code("hlt", HANDLERS + 16 * 11)
    silicon.code("hlt", HANDLERS + 16 * 13)
    vmcb = silicon.long_mode()
    vmcb.cr0 |= 8  # TS
    silicon.memory.write(IDT + 16 * (0x40 if software else 7), bytes(16))
    silicon.code("int 0x40" if software else "fld1")
    silicon.run(vmcb)
    assert silicon.memory.u64(STACK - FRAME - 8) == (0x202 if software else 7 << 3 | 3)


def test_an_interrupt_window_opens_after_the_shadow_of_sti(silicon):
    vmcb = silicon.long_mode()
    labels = silicon.code("nop; sti; nop; here: nop; hlt")
    silicon.enter(vmcb)
    silicon.processor.request_window(True)
    assert silicon.processor.window_requested
    assert silicon.run() == [0x64]
    assert silicon.state.rip == labels["here"]
    silicon.processor.request_window(False)
    assert not silicon.processor.window_requested
    assert silicon.run() == [HLT]


def test_no_window_opens_while_if_is_clear(silicon):
    vmcb = silicon.long_mode()
    silicon.code("nop; hlt")
    silicon.enter(vmcb)
    silicon.processor.request_window(True)
    assert silicon.run() == [HLT]


# -- the clock ---------------------------------------------------------------------------------

LOOP = "xor ecx, ecx; again: inc rcx; jmp again"


@pytest.mark.parametrize("budget", [0, 1, 2, 17, 1000, 123_456])
def test_a_budget_is_exact(silicon, budget):
    before = silicon.processor.blocks
    assert silicon.run_text(LOOP, budget=budget) == [glue.EXIT_BUDGET]
    assert silicon.processor.blocks - before == budget + 1
    # The first block of the loop is its second run, and the block that is not entered counts.
    assert silicon.state.q[1] == max(0, budget)
    assert silicon.state.rip == (CODE if budget == 0 else silicon.labels["again"])


def test_a_program_counts_the_same_blocks_each_time(silicon):
    def count():
        before = silicon.processor.blocks
        silicon.run_text("mov ecx, 1000; 1: loop 1b; call f; hlt; f: ret")
        return silicon.processor.blocks - before

    # The start, 999 jumps back, the call, the function, and the return's target.
    assert count() == count() == 1003


def test_a_new_budget_from_the_handler_counts_from_there(silicon):
    seen = []

    def on_exit(code):
        seen.append(silicon.processor.blocks)
        silicon.processor.set_budget(10)
        return RESUME if len(seen) < 5 else STOP

    silicon.run_text(LOOP, on_exit=on_exit, budget=5)
    assert {b - a for a, b in itertools.pairwise(seen)} == {11}


def test_a_kick_from_a_thread_ends_a_loop(silicon):
    timer = threading.Timer(0.05, silicon.processor.kick)
    timer.start()
    assert silicon.run_text(LOOP, budget=1 << 62) == [glue.EXIT_BUDGET]
    timer.join()


def test_a_kick_before_the_run_is_not_lost(silicon):
    silicon.processor.kick()
    assert silicon.run_text(LOOP, budget=1 << 62) == [glue.EXIT_BUDGET]
    assert silicon.run_text("hlt") == [HLT]  # once


def test_exceptions_that_never_reach_a_block_use_up_the_budget(silicon):
    vmcb = silicon.long_mode()
    # The handler of #PF is not mapped, and each #PF has a fresh stack.
    gate = Gate(8, 0x40000000, SystemType.INTERRUPT_GATE, 3, True, ist=1)
    silicon.memory.write(IDT + 16 * 14, gate.descriptor())
    silicon.memory.write(TSS + 36, struct.pack("<Q", STACK))
    silicon.code("mov esi, 0x40000000; jmp rsi")
    assert silicon.run(vmcb, budget=1000) == [glue.EXIT_BUDGET]


# -- memory and code ---------------------------------------------------------------------------


def test_code_that_python_writes_is_executed(silicon):
    def on_exit(code):
        if len(silicon.exits) == 3:
            return STOP
        silicon.memory.write(CODE + 1, bytes([len(silicon.exits) + 5]))
        silicon.state.rip = CODE
        return RESUME

    silicon.run_text("mov eax, 5; cpuid", on_exit=on_exit)
    assert silicon.state.q[0] == 7


def test_code_that_the_guest_writes_is_executed(silicon):
    silicon.run_text(
        "mov ecx, 3; again: call f; inc byte ptr [f + 1]; loop again; hlt; f: mov eax, 1; ret"
    )
    assert silicon.state.q[0] == 3


def test_code_that_another_vcpu_wrote_is_executed(silicon):
    silicon.run_text("f: mov eax, 1; hlt")
    first = silicon.processor.park()
    vmcb = silicon.long_mode()
    silicon.code(f"mov byte ptr [{CODE + 1:#x}], 9; hlt", 0x200000)
    vmcb.rip = 0x200000
    silicon.run(vmcb)
    silicon.processor.unpark(first)
    silicon.state.rip = CODE
    silicon.run()
    assert silicon.state.q[0] == 9


def test_a_parked_vcpu_comes_back_as_it_was(silicon):
    silicon.run_text("mov eax, 5; mov ebx, 6; movq xmm2, rax; fld1; cpuid; hlt")
    parked = silicon.processor.park()
    silicon.run_text("mov eax, 1; mov ebx, 2; pxor xmm2, xmm2; fninit; hlt")
    assert silicon.processor.park() != parked
    silicon.processor.unpark(parked)
    assert silicon.processor.park() == parked
    silicon.state.rip += 2
    assert silicon.run() == [HLT]
    assert silicon.state.q[3] == 6


def test_what_is_not_a_parked_state_is_refused(silicon):
    with pytest.raises(ValueError, match="parked"):
        silicon.processor.unpark(b"short")


def test_a_flushed_translation_is_walked_again(silicon):
    def on_exit(code):
        if code == HLT:
            return STOP
        silicon.memory.set_u64(PDPT + 8, 0x87)
        silicon.processor.flush()
        silicon.state.rip += 2
        return RESUME

    silicon.memory.write(DATA, b"\x2a")
    vmcb = silicon.long_mode(Intercept.EXCP_PF)
    silicon.code(f"cpuid; mov esi, {0x40000000 + DATA:#x}; movzx ebx, byte ptr [rsi]; hlt")
    assert silicon.run(vmcb, on_exit) == [CPUID, HLT]
    assert silicon.state.q[3] == 0x2A


# -- floating point ----------------------------------------------------------------------------


def test_the_fpu_image_is_what_fxsave_stores(silicon):
    silicon.run_text(
        "fninit; fldpi; fld1; fldz; mov rax, 0x0123456789abcdef; movq xmm0, rax; movq xmm15, rax;"
        "mov dword ptr [0x8100], 0x1fa0; ldmxcsr [0x8100]; fxsave64 [0x8200]; hlt"
    )
    image, stored = silicon.processor.fpu.save(), silicon.memory.read(0x8200, 512)
    compared = [*range(5), *range(24, 28), *range(32, 416)]
    padding = {32 + 16 * i + j for i in range(8) for j in range(10, 16)}
    for i in compared:
        if i not in padding:
            assert image[i] == stored[i], i


def test_an_fpu_image_is_loaded(silicon):
    silicon.run_text("fninit; fldpi; fld1; mov eax, 77; movd xmm7, eax; hlt")
    image = silicon.processor.fpu.save()
    silicon.run_text(
        "fninit; pxor xmm7, xmm7; cpuid; fistp qword ptr [0x8000]; movd ebx, xmm7; hlt"
    )
    fpu = silicon.processor.fpu
    fpu.restore_x87(image)
    fpu.restore_sse(image)
    fpu.set_mxcsr(fpu.mxcsr_of(image))
    assert fpu.in_use(image) == 3
    silicon.state.rip += 2
    assert silicon.run() == [HLT]
    assert (silicon.memory.u64(0x8000), silicon.state.q[3]) == (1, 77)
    assert fpu.in_use(image[:32] + bytes(480)) & 2 == 0


# -- ring transitions --------------------------------------------------------------------------


@pytest.mark.parametrize("attributes", [0x8B, 0x89, 0x0B, 0, 0x83, 0x82, 0xFFF])
def test_no_task_register_that_a_vmcb_can_hold_kills_the_process(silicon, attributes):
    vmcb = silicon.long_mode()
    vmcb.set_segment(VmcbField.TR_SELECTOR, Segment(0x30, TSS, 0x67, attributes))
    vmcb.cpl = 3
    for name, selector, rights in (("CS", 0x2B, 0xAFB), ("SS", 0x23, 0xCF3)):
        segment = Segment(selector, 0, 0xFFFFFFFF, rights)
        vmcb.set_segment(VmcbField[f"{name}_SELECTOR"], segment)
    silicon.memory.write(PML4, struct.pack("<Q", PDPT | 7))
    silicon.code("int 0x40")
    silicon.code("hlt", HANDLERS + 16 * 0x40)
    assert silicon.run(vmcb) == [HLT]
    assert silicon.state.q[4] == STACK - 0x1000 - FRAME
    back = SiliconVmcb(silicon.memory)
    silicon.processor.save_extra(back)
    assert back.segment(VmcbField.TR_SELECTOR).attributes == attributes


def test_processors_can_come_and_go(silicon):
    """The library's repairs outlive the processor that made them."""
    for _ in range(3):
        other = Silicon()
        assert other.run_text("in al, 0x40") == [glue.EXIT_IOIO]
        del other
    assert silicon.run_text("in al, 0x40") == [glue.EXIT_IOIO]
    assert isinstance(silicon.processor, Processor)
