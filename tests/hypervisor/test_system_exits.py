"""Instructions that exit: identification, time, waiting, the emulated ones, system calls, LTR."""

import struct

import pytest
from small_guests import (
    CODE64,
    DATA,
    GDT,
    PDPT,
    TASK,
    TO_USER,
    USER32,
    build,
    in_ring_3,
    run,
    run16,
    run32,
)

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.x86.msr import Msr
from undervisor.hypervisor.exits import EXITS, UNSUPPORTED
from undervisor.hypervisor.exits.exceptions import EMULATED
from undervisor.hypervisor.machine import BLOCK_NS, EXIT_NS
from undervisor.hypervisor.models.leaves import CpuidState
from undervisor.hypervisor.models.overrides import named
from undervisor.silicon import glue

GP, UD, DB = (13, 0), (6, 0), (1, 0)
MODELS = ["intel", "amd"]


def wrmsr(number, value):
    low, high = value & 0xFFFFFFFF, value >> 32
    return f"mov ecx, {number:#x}; mov eax, {low:#x}; mov edx, {high:#x}; wrmsr;"


def cr4(bit):
    return f"mov rax, cr4; bts rax, {bit}; mov cr4, rax;"


# -- completeness ------------------------------------------------------------------------------


def test_every_exit_code_is_handled_or_has_a_reason_not_to_be():
    for code in ExitCode:
        assert (code in EXITS) != (code in UNSUPPORTED), code.name
    assert all(UNSUPPORTED.values())


def test_every_exit_of_the_silicons_own_is_handled():
    own = {value for name, value in vars(glue).items() if name.startswith("EXIT_")}
    assert own <= set(EXITS)


# -- CPUID -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cpu", MODELS)
@pytest.mark.parametrize(
    ("leaf", "subleaf"), [(0, 0), (4, 1), (7, 0), (0x80000000, 0), (0x80000002, 0), (0x40000000, 0)]
)
def test_cpuid_gives_the_models_answer(cpu, leaf, subleaf):
    text = f"mov rax, -1; mov eax, {leaf:#x}; mov rcx, -1; mov ecx, {subleaf}; cpuid"
    result = run(text, cpu)
    expected = named(cpu).cpuid(leaf, subleaf, CpuidState(cpus=1))
    assert (result.rax, result.rbx, result.rcx, result.rdx) == expected


def test_cpuid_may_have_prefixes():
    result = run("xor eax, eax; .byte 0x66, 0x48, 0x0f, 0xa2; mov r8, 1")
    assert result.r8 == 1
    assert result.rbx == 0x756E6547


def test_cpuid_works_in_ring_3():
    assert in_ring_3("xor eax, eax; cpuid; mov r8, rbx; mov r9, 1", iopl=3).r8 == 0x756E6547


# -- time --------------------------------------------------------------------------------------


def test_the_tsc_counts_blocks_and_exits():
    result = run("rdtsc; mov r8, rax; mov ecx, 1000; 1: loop 1b; rdtsc; mov r9, rax")
    assert result.r9 - result.r8 == 1000 * BLOCK_NS + EXIT_NS + BLOCK_NS


@pytest.mark.parametrize("cpu", MODELS)
def test_rdtscp_gives_tsc_aux_as_well(cpu):
    result = run(wrmsr(Msr.TSC_AUX, 0x55) + "rdtsc; mov r8, rax; rdtscp; mov r9, rcx", cpu)
    assert result.r9 == 0x55
    assert result.r8 < result.rax < result.r8 + 100_000


@pytest.mark.parametrize("text", ["rdtsc", "rdtscp"])
def test_cr4_tsd_bars_ring_3_from_the_tsc(text):
    assert in_ring_3(text, iopl=3).faults == []
    assert run(cr4(2) + text).faults == []
    assert run(cr4(2) + TO_USER % "0x3002" + text).faults == [GP]


def test_rdpmc_has_no_counter():
    assert run("xor ecx, ecx; rdpmc").faults == [GP]


# -- waiting -----------------------------------------------------------------------------------


def test_hlt_pause_and_the_like_are_not_for_ring_3():
    assert in_ring_3("hlt").faults == [GP]
    assert in_ring_3("pause; mov ebx, 1", iopl=3).rbx == 1


@pytest.mark.parametrize("cpu", MODELS)
def test_monitor_and_mwait_return(cpu):
    has = named(cpu).has("monitor")
    result = run(f"mov eax, {DATA:#x}; xor ecx, ecx; xor edx, edx; monitor; mwait; mov ebx, 1", cpu)
    assert (result.rbx == 1) == has
    assert result.faults == ([] if has else [UD])


def test_monitor_and_mwait_refuse_unknown_extensions():
    assert run(f"mov eax, {DATA:#x}; mov ecx, 1; xor edx, edx; monitor").faults == [GP]
    assert run("xor eax, eax; mov ecx, 2; mwait").faults == [GP]


# -- emulated instructions ---------------------------------------------------------------------


def test_random_numbers_are_the_same_in_every_run():
    text = "rdrand r8; setc bl; rdseed r9; setc bh; rdrand r10d; rdrand r11w"
    first, second = run(text), run(text)
    assert [first.register(0, i) for i in range(16)] == [second.register(0, i) for i in range(16)]
    assert first.r8 != first.r9
    assert first.r8 >> 32
    assert not first.r10 >> 32
    assert first.rbx == 0x101


def test_rdrand_clears_the_flags_but_carry():
    assert run("mov ah, 0xff; sahf; rdrand r8; pushfq; pop r9").r9 & 0x8D5 == 1


@pytest.mark.parametrize("name", ["rdrand", "rdseed"])
def test_a_model_without_random_numbers_raises_ud(name):
    assert run(f"{name} rax", f"intel,-{name}").faults == [UD]


@pytest.mark.parametrize("cpu", MODELS)
def test_rdpid_gives_tsc_aux(cpu):
    result = run(wrmsr(Msr.TSC_AUX, 0x77) + "rdpid rbx", cpu + ",+rdpid")
    assert result.rbx == 0x77


INVPCID = f"mov ebx, %d; mov eax, {DATA:#x}; invpcid rbx, [rax];"


@pytest.mark.parametrize("kind", range(4))
def test_invpcid_drops_stale_translations(kind):
    text = (
        f"mov esi, 0x80000000; mov qword ptr [{DATA:#x}], 0; mov [{DATA + 8:#x}], rsi;"
        f"mov rax, [rsi]; mov qword ptr [{PDPT + 16:#x}], 0;"
    )
    result = run(text + INVPCID % kind + "mov rax, [rsi]")
    assert result.faults == [(14, 0)]


@pytest.mark.parametrize(
    ("kind", "low", "high"), [(4, 0, 0), (0, 1 << 12, 0), (0, 0, 1 << 63), (0, 1, 0), (1, 1, 0)]
)
def test_invpcid_refuses_bad_operands(kind, low, high):
    text = f"movabs rax, {low:#x}; mov [{DATA:#x}], rax; movabs rax, {high:#x};"
    text += f"mov [{DATA + 8:#x}], rax;"
    assert run(text + INVPCID % kind).faults == [GP]


def test_invpcid_is_not_for_ring_3():
    assert in_ring_3(INVPCID % 2).faults == [GP]


XSTATE = cr4(18) + "xor ecx, ecx; mov eax, 3; xor edx, edx; xsetbv;"
AREA = 0x200000


def test_xsaves_and_xrstors_keep_x87_and_sse():
    text = (
        XSTATE
        + "fninit; fld1; fldpi; mov rax, 0x1122334455667788; movq xmm3, rax; movq xmm15, rax;"
        f"mov eax, 3; xor edx, edx; mov edi, {AREA:#x}; xsaves [rdi]; fninit; pxor xmm3, xmm3;"
        "pxor xmm15, xmm15; xrstors [rdi]; movq r8, xmm3; movq r9, xmm15;"
        f"fistp qword ptr [{DATA:#x}]; mov r10, [{DATA:#x}]; fistp qword ptr [{DATA:#x}];"
        f"mov r11, [{DATA:#x}]"
    )
    result = run(text)
    assert result.faults == []
    assert result.r8 == result.r9 == 0x1122334455667788
    assert (result.r10, result.r11) == (3, 1)
    assert result.u64(AREA + 512) == 3
    assert result.u64(AREA + 520) == 1 << 63 | 3


def test_xrstors_initializes_what_the_header_does_not_have():
    text = XSTATE + f"mov rax, -1; movq xmm1, rax; mov edi, {AREA:#x}; mov eax, 3; xor edx, edx;"
    text += (
        "bts qword ptr [rdi + 520], 63; or qword ptr [rdi + 520], 3; xrstors [rdi]; movq r8, xmm1"
    )
    result = run(text)
    assert result.faults == []
    assert result.r8 == 0


@pytest.mark.parametrize(
    "spoil",
    [
        "mov qword ptr [rdi + 520], 3",  # not compacted
        "mov qword ptr [rdi + 528], 1",  # reserved
        "mov qword ptr [rdi + 512], 4",  # a component that is not in the layout
        "add edi, 8",  # not aligned
        "mov byte ptr [rdi + 27], 1",  # MXCSR
    ],
)
def test_xrstors_refuses_a_bad_area(spoil):
    text = XSTATE + f"mov edi, {AREA:#x}; mov eax, 3; xor edx, edx; xsaves [rdi];"
    if "+ 27" in spoil:
        text += "or qword ptr [rdi + 512], 2;"
    assert run(text + spoil + "; xrstors [rdi]").faults == [GP]


def test_xsaves_needs_osxsave_and_ring_0():
    assert run(f"mov edi, {AREA:#x}; xsaves [rdi]").faults == [UD]
    assert run(XSTATE + TO_USER % "2" + f"mov edi, {AREA:#x}; xsaves [rdi]").faults == [GP]


def test_xsaves_under_ts_raises_nm():
    text = XSTATE + "mov rax, cr0; or eax, 8; mov cr0, rax;"
    assert run(text + f"mov edi, {AREA:#x}; xsaves [rdi]").faults == [(7, 0)]


def test_every_emulated_instruction_is_of_a_feature_that_some_model_has():
    offered = named("intel,+rdpid").features | named("amd,+rdpid").features
    assert {feature for feature, _ in EMULATED.values()} <= offered


@pytest.mark.parametrize(
    "text",
    [
        "vmcall",
        "ud2",
        "rsm",
        "vmxoff",
        ".byte 0x0f, 0x0b",
        "vmptrst [rsi]",
        "sha1msg1 xmm0, xmm1",
    ],
)
def test_what_the_processor_lacks_or_has_switched_off_is_undefined(text):
    assert run(f"mov esi, {DATA:#x}; here: {text}").faults == [UD]


@pytest.mark.parametrize(
    "text", ["vmrun", "vmload", "vmsave", "stgi", "clgi", "vmmcall", "invlpga"]
)
def test_svm_instructions_are_undefined_on_intel_and_without_svme(text):
    operands = {"vmrun": "rax", "vmload": "rax", "vmsave": "rax", "invlpga": "rax, ecx"}
    text = f"{text} {operands.get(text, '')}"
    assert run(text, "intel").faults == [UD]
    if not text.startswith("vmmcall"):
        assert run(text, "amd").faults == [UD]


@pytest.mark.parametrize("text", ["wbinvd", "invd", "wbinvd; invd"])
def test_cache_invalidation_does_nothing_in_ring_0_and_faults_in_ring_3(text):
    assert run(text + "; mov ebx, 1").rbx == 1
    assert in_ring_3(text).faults == [GP]


def test_int1_is_a_trap():
    result = run(".byte 0xf1; after: nop")
    assert result.faults == [DB]
    assert result.events[0].rip == result.labels["after"]


# -- LTR ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "fault"),
    [
        (0, GP),
        (3, GP),
        (TASK, (13, TASK)),  # busy already
        (CODE64, (13, CODE64)),
        (0x7FF8, (13, 0x7FF8)),
        (TASK | 4, (13, TASK | 4)),
    ],
)
def test_ltr_refuses_what_is_no_available_tss(selector, fault):
    assert run(f"mov eax, {selector:#x}; ltr ax").faults == [fault]


def test_ltr_loads_a_tss_and_marks_it_busy():
    text = f"mov byte ptr [{GDT + TASK + 5:#x}], 0x89; mov eax, {TASK}; ltr ax; str ebx;"
    result = run(text + f"movzx ecx, byte ptr [{GDT + TASK + 5:#x}]")
    assert (result.rbx, result.rcx) == (TASK, 0x8B)


def test_ltr_refuses_a_tss_that_is_not_present():
    text = f"mov byte ptr [{GDT + TASK + 5:#x}], 9; mov eax, {TASK}; ltr ax"
    assert run(text).faults == [(11, TASK)]


def test_ltr_from_memory():
    text = f"mov byte ptr [{GDT + TASK + 5:#x}], 0x89; mov word ptr [{DATA:#x}], {TASK};"
    assert run(text + f"ltr word ptr [{DATA:#x}]; mov ebx, 1").rbx == 1


def test_ltr_is_not_for_ring_3():
    assert in_ring_3(f"mov eax, {TASK}; ltr ax").faults == [GP]


def test_ltr_is_undefined_in_real_mode():
    text = (
        "mov word ptr [6*4], offset caught; mov word ptr [6*4+2], 0; mov ax, 8; .byte 0x0f,0,0xd8;"
        "mov bl, 1; jmp over; caught: mov bl, 2; over:"
    )
    assert run16(text).rbx & 0xFF == 2


# -- system calls ------------------------------------------------------------------------------

STAR = CODE64 << 32 | (USER32 | 3) << 48


@pytest.mark.parametrize("cpu", MODELS)
def test_syscall_enters_the_kernel_and_sysret_leaves_it(cpu):
    def prepare(machine, labels):
        machine.memory.write(DATA, struct.pack("<Q", labels["kernel"]))

    text = (
        wrmsr(Msr.STAR, STAR) + wrmsr(Msr.FMASK, 0x4600)
        + f"mov rax, [{DATA:#x}]; mov rdx, rax; shr rdx, 32; mov ecx, {Msr.LSTAR:#x}; wrmsr;"
        + "mov ecx, offset user; mov r11d, 0x3202; sysretq;"
        + "user: mov r8w, cs; mov r9w, ss; syscall; back: mov r10, 1; jmp over;"
        + "kernel: mov r12w, cs; mov r13w, ss; mov r14, rcx; mov r15, r11; pushfq; pop rbx;"
        + "sysretq;"
        + "over:"
    )  # fmt: skip
    result = run(text, cpu, prepare=prepare)
    assert result.faults == []
    assert (result.r8 & 0xFFFF, result.r9 & 0xFFFF) == (USER32 + 16 | 3, USER32 + 8 | 3)
    assert (result.r12 & 0xFFFF, result.r13 & 0xFFFF) == (CODE64, CODE64 + 8)
    assert result.r14 == result.labels["back"]
    assert result.r15 & 0x3200 == 0x3200
    assert result.rbx & 0x4600 == 0
    assert result.r10 == 1


def test_syscall_without_sce_is_undefined():
    assert run(wrmsr(Msr.EFER, 0x900) + "syscall").faults == [UD]


def test_sysenter_and_sysexit():
    text = (
        wrmsr(Msr.SYSENTER_CS, CODE64) + wrmsr(Msr.SYSENTER_ESP, 0x70000)
        + "mov eax, offset kernel; xor edx, edx; mov ecx, 0x176; wrmsr;"
        + "sti; sysenter; kernel: mov r8, rsp; mov r9w, cs; pushfq; pop r10;"
        + "mov ecx, 0x78000; mov edx, offset user; rex64 sysexit;"
        + "user: mov r11w, cs; mov r12, rsp; hlt"
    )  # fmt: skip
    result = run(text, "intel")
    assert result.faults == [GP]  # HLT in ring 3
    assert (result.r8, result.r9 & 0xFFFF) == (0x70000, CODE64)
    assert result.r10 & 0x200 == 0
    assert (result.r11 & 0xFFFF, result.r12) == (CODE64 + 32 | 3, 0x78000)


def test_sysenter_with_a_null_cs_raises_gp():
    assert run("sysenter", "intel").faults == [GP]


def test_sysenter_in_long_mode_is_undefined_on_amd():
    assert run(wrmsr(Msr.SYSENTER_CS, CODE64) + "sysenter", "amd").faults == [UD]


def test_sysenter_works_in_protected_mode_on_both_vendors():
    text = (
        "mov ecx, 0x174; mov eax, 8; xor edx, edx; wrmsr; mov ecx, 0x175; mov eax, 0x70000; wrmsr;"
        "mov ecx, 0x176; mov eax, offset kernel; wrmsr; sysenter; mov ebx, 2;"
        "kernel: mov esi, esp; mov ebx, 1"
    )
    for cpu in MODELS:
        result = run32(text, cpu)
        assert (result.rbx, result.rsi) == (1, 0x70000)


def test_two_machines_of_one_process_do_not_disturb_each_other():
    first = build()
    second = build()
    run("mov edx, 0x3f8; mov al, 'b'; out dx, al", machine=second)
    del second
    assert run("mov edx, 0x3f8; mov al, 'a'; out dx, al", machine=first).output == b"a"
