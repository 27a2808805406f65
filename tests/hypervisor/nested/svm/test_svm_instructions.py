"""SVM's instructions in L1, what VMRUN refuses, and what a world switch keeps apart."""

import pytest
from svm_world import (
    CODE32,
    CS32,
    DATA,
    DS,
    ENTER_ONCE,
    IDT,
    L2_CODE,
    L2_STACK,
    MEMORY,
    VMCB12,
    World,
    gate,
)

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.svm.vmcb import VMLOAD_RANGES, Vmcb, VmcbField
from undervisor.arch.x86.events import Vector
from undervisor.arch.x86.msr import Msr
from undervisor.arch.x86.registers import Cr0, Efer
from undervisor.arch.x86.segments import Segment, real_mode_segment

FAULT_HANDLER = 0x230000
INVALID = (1 << 64) - 1
OTHER = 0x303000


def faults_in_l1(code, vector, **changes):
    """Run `code` as L1; where the fault's frame says it was."""
    world = World("nop", l1=f"{code}\nout %eax, $0xf4")
    world.memory.write(FAULT_HANDLER, b"\x90\xe7\xf4")
    world.memory.write(IDT + 16 * vector, gate(FAULT_HANDLER))
    for name, value in changes.items():
        setattr(world.vcpu.state, name, value)
    world.run()
    assert world.vcpu.state.rip >= FAULT_HANDLER
    stack = world.vcpu.state.q[4] + (8 if vector == Vector.GP else 0)
    return world.memory.u64(stack), world.l1


@pytest.mark.parametrize("instruction", ["vmrun %rax", "vmload %rax", "vmsave %rax"])
@pytest.mark.parametrize("address", [VMCB12 + 8, VMCB12 + 0x800, 1 << 40, 1 << 63])
def test_an_address_that_is_no_page_or_too_high_is_a_general_protection_fault(instruction, address):
    where, code = faults_in_l1(f"mov ${address:#x}, %rax; at: {instruction}", Vector.GP)
    assert where == code.labels["at"]


@pytest.mark.parametrize(
    "instruction",
    ["vmrun %rax", "vmload %rax", "vmsave %rax", "stgi", "clgi", "invlpga %rax, %ecx", "vmmcall"],
)
def test_without_efer_svme_there_are_no_such_instructions(instruction):
    clear = f"mov $0xc0000080, %ecx; rdmsr; and ${~int(Efer.svme) & 0xFFFFFFFF:#x}, %eax; wrmsr"
    where, code = faults_in_l1(f"{clear}; at: {instruction}", Vector.UD)
    assert where == code.labels["at"]


@pytest.mark.parametrize("instruction", ["vmmcall", "skinit %eax"])
def test_what_this_processor_does_not_do_is_undefined_in_l1(instruction):
    where, code = faults_in_l1(f"at: {instruction}", Vector.UD)
    assert where == code.labels["at"]


@pytest.mark.parametrize(
    "instruction",
    ["vmrun %rax", "vmload %rax", "vmsave %rax", "stgi", "clgi", "invlpga %rax, %ecx"],
)
def test_the_instructions_are_for_ring_0(instruction):
    ring3 = "push $0x33; push $0x2e0000; push $2; push $0x2b; push $at; iretq"
    where, code = faults_in_l1(f"mov $VMCB12, %eax; {ring3}; at: {instruction}", Vector.GP)
    assert where == code.labels["at"]


def test_svm_cannot_be_enabled_where_vm_cr_disables_it():
    code = f"""
        mov ${int(Msr.VM_CR):#x}, %ecx; mov $0x10, %eax; xor %edx, %edx; wrmsr
        mov $0xc0000080, %ecx; rdmsr; or $0x1000, %eax
        at: wrmsr
    """
    clear = "mov $0xc0000080, %ecx; rdmsr; and $0xffffefff, %eax; wrmsr;"
    where, assembled = faults_in_l1(clear + code, Vector.GP)
    assert where == assembled.labels["at"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (VmcbField.GUEST_ASID, 0),
        (VmcbField.INTERCEPT_WORD4, 0),
        (VmcbField.EFER, int(Efer.lme | Efer.lma)),
        (VmcbField.CR0, int(Cr0.pg | Cr0.pe | Cr0.nw)),
        (VmcbField.CR3, 1 << 52),
        (VmcbField.CR4, 1 << 30 | 0x20),
        (VmcbField.DR7, 1 << 32),
        (VmcbField.N_CR3, 1 << 52),
        (VmcbField.EVENTINJ, 0x80000302),
    ],
)
def test_a_broken_rule_is_vmexit_invalid_and_the_host_goes_on(field, value):
    world = World("nop")
    world.vmcb[field] = value
    world.run()
    assert world.vmcb.exitcode == INVALID
    assert world.vmcb.exitinfo1 == world.vmcb.exitinfo2 == 0
    assert world.vmcb.rip == L2_CODE
    assert not world.vcpu.gif
    assert world.vcpu.nested.state.broken.broken


def test_vmrun_where_nothing_answers_is_invalid():
    world = World("nop", l1=f"mov ${MEMORY:#x}, %rax; vmrun %rax; out %eax, $0xf4")
    world.run()
    assert world.vcpu.nested.reason == "#VMEXIT(INVALID)"


def test_gif_is_set_in_l2_and_clear_after_it():
    world = World("nop", l1="clgi; stgi; clgi; stgi;" + ENTER_ONCE)
    world.run()
    assert not world.vcpu.gif


def test_vmload_and_vmsave_move_all_of_their_state_and_nothing_else():
    l1 = f"mov ${VMCB12:#x}, %eax; vmload %rax; mov ${OTHER:#x}, %eax; vmsave %rax; out %eax, $0xf4"
    world = World("nop", l1=l1)
    source, target = world.vmcb, Vmcb(world.memory.view(OTHER))
    for field, base in ((VmcbField.FS_SELECTOR, 0x1111), (VmcbField.GS_SELECTOR, 0x2222)):
        source.set_segment(field, Segment(0x33, base << 12, 0xFFFFF, 0xCF3))
    source.set_segment(VmcbField.LDTR_SELECTOR, Segment(0x50, 0x3333000, 0x77, 0x82))
    source.set_segment(VmcbField.TR_SELECTOR, Segment(0x40, 0x4444000, 0x67, 0x8B))
    for number, field in enumerate(f for f in VmcbField if VmcbField.STAR <= f < VmcbField.CR2):
        source[field] = 0x1000 + number
    world.run()
    inside = set()
    for start, end in VMLOAD_RANGES:
        assert bytes(target.b[start:end]) == bytes(source.b[start:end])
        inside.update(range(start, end))
    assert not any(target.b[at] for at in range(4096) if at not in inside)


def test_noncanonical_bases_become_canonical():
    l1 = "mov $VMCB12, %eax; vmload %rax; vmsave %rax; vmrun %rax; out %eax, $0xf4"
    world = World("nop", l1=l1)
    loaded = (VmcbField.FS_BASE, VmcbField.GS_BASE, VmcbField.TR_BASE, VmcbField.LDTR_BASE)
    for field in (*loaded, VmcbField.KERNEL_GS_BASE):
        world.vmcb[field] = 0xAAAA_8000_0000_1000
    world.vmcb.ds_base = world.vmcb.es_base = 0xAAAA_8000_0000_0000
    world.run()
    assert world.vmcb.exitcode == ExitCode.VMMCALL
    for field in (*loaded, VmcbField.KERNEL_GS_BASE):
        assert world.vmcb[field] == 0xFFFF_8000_0000_1000
    assert world.vmcb.ds_base == 0xFFFF_8000_0000_0000


@pytest.mark.parametrize("virtual", [False, True])
def test_vmsave_in_l2_uses_the_address_that_virtualization_names(virtual):
    world = World(f"mov ${OTHER:#x}, %rax; vmsave %rax", nested=12)
    world.vmcb.lbr_control = 2 if virtual else 0
    moved = 0x700000
    where = world.npte(OTHER)
    world.memory.set_u64(where, moved | 0x67)
    world.vmcb.set_segment(VmcbField.FS_SELECTOR, Segment(0x10, 0x5678000, 0xFFFF, 0xC93))
    world.run()
    here, there = (moved, OTHER) if virtual else (OTHER, moved)
    assert world.memory.u64(here + VmcbField.FS_BASE) == 0x5678000
    assert world.memory.u64(there + VmcbField.FS_BASE) == 0


def test_the_host_finds_its_registers_again():
    l1 = f"""
        mov $0x7777, %ebx; mov $0x8888, %r15d; mov %rsp, %rbp; mov $VMCB12, %rax; vmrun %rax
        mov %rax, DATA; mov %rsp, DATA + 8; mov %cr3, %rcx; mov %rcx, DATA + 16
        mov %dr7, %rcx; mov %rcx, DATA + 24; mov %rbx, DATA + 32; mov %cr2, %rcx
        mov %rcx, DATA + 40; pushfq; pop %rcx; mov %rcx, DATA + 48
        sidt {DATA + 64:#x}; out %eax, $0xf4
    """
    world = World("mov $1, %ebx; mov $2, %esp; mov $3, %eax; xor %ecx, %ecx; lidt (%rcx)", l1=l1)
    world.vmcb.dr7, world.vmcb.cr2, world.vmcb.rflags = 0x401, 0x123000, 0x8D7
    world.run()
    assert world.data(0) == VMCB12
    assert world.data(1) == world.vcpu.state.q[5]
    assert world.data(2) == world.vcpu.state.cr3
    assert world.data(3) == 0x400
    assert world.data(4) == 1, "other registers are L2's"
    assert world.data(5) == 0x123000, "CR2 is not host state"
    assert world.data(6) & ~0x44 == 2
    assert int.from_bytes(world.memory.read(DATA + 66, 8), "little") == IDT
    assert (world.vmcb.rax, world.vmcb.rsp) == (3, 2)
    assert world.vmcb.dr7 == 0x401


MODES = {
    "real": (".code16; mov $0x1234, %eax; mov %eax, 0x8000; vmmcall", 0, False),
    "32-bit": (".code32; mov $0x1234, %eax; mov %eax, 0x8000; vmmcall", Cr0.pe, False),
    "compatibility": (".code32; mov $0x1234, %eax; mov %eax, 0x8000; vmmcall", Cr0.pe, True),
}


@pytest.mark.parametrize("mode", MODES)
def test_l2_may_be_in_any_mode(mode):
    source, cr0, long_mode = MODES[mode]
    world = World("nop")
    from undervisor.guest.asm import assemble

    start = 0x9000
    world.memory.write(start, assemble(source, start).bytes)
    vmcb = world.vmcb
    vmcb.rip, vmcb.rsp = start, 0x7000
    if mode == "real":
        for field in (VmcbField.DS_SELECTOR, VmcbField.SS_SELECTOR, VmcbField.ES_SELECTOR):
            vmcb.set_segment(field, real_mode_segment(0))
        vmcb.set_segment(VmcbField.CS_SELECTOR, real_mode_segment(0, code=True))
    else:
        vmcb.set_segment(VmcbField.CS_SELECTOR, Segment(CS32, 0, 0xFFFFFFFF, CODE32))
        vmcb.set_segment(VmcbField.DS_SELECTOR, Segment(DS, 0, 0xFFFFFFFF, 0xC93))
    if not long_mode:
        vmcb.cr0, vmcb.cr3, vmcb.cr4, vmcb.efer = cr0 | Cr0.et, 0, 0, Efer.svme
    world.run()
    assert vmcb.exitcode == ExitCode.VMMCALL
    assert vmcb.nrip == vmcb.rip + 3
    assert world.memory.u64(0x8000) & 0xFFFFFFFF == 0x1234
    assert vmcb.efer & Efer.lma == (Efer.lma if long_mode else 0)


def test_l2_goes_down_to_real_mode_and_comes_back():
    down = """
        ljmp *where
        where: .long 1f, 0x18
        .code32
    1:  mov %cr0, %eax; and $0x7fffffff, %eax; mov %eax, %cr0
        mov $0xc0000080, %ecx; rdmsr; and $~0x100, %eax; wrmsr
        mov %cr0, %eax; and $~1, %eax; mov %eax, %cr0
        vmmcall
        mov %cr0, %eax; or $1, %eax; mov %eax, %cr0
        mov $0xc0000080, %ecx; rdmsr; or $0x100, %eax; wrmsr
        mov %cr0, %eax; or $0x80000000, %eax; mov %eax, %cr0
        ljmp $8, $2f
        .code64
    2:
    """
    l1 = """
        mov $VMCB12, %rax
        vmload %rax
        vmrun %rax
        mov VMCB12 + 0x558, %rbx; mov %rbx, DATA
        mov VMCB12 + 0x4d0, %rbx; mov %rbx, DATA + 8
        addq $3, VMCB12 + 0x578
        vmrun %rax
        out %eax, $0xf4
    """
    world = World(down, l1=l1)
    world.run()
    assert world.data(0) & (Cr0.pg | Cr0.pe) == 0
    assert world.data(1) & (Efer.lme | Efer.lma) == 0
    assert world.vmcb.exitcode == ExitCode.VMMCALL
    assert world.vmcb.efer & Efer.lma
    assert world.vmcb.cr0 & Cr0.pg


def test_two_guests_of_one_processor_do_not_mix():
    l1 = f"""
        mov $VMCB12, %rax; vmrun %rax
        mov ${OTHER:#x}, %rax; vmrun %rax
        mov $VMCB12, %rax; addq $3, VMCB12 + 0x578; vmrun %rax
        out %eax, $0xf4
    """
    world = World("vmmcall; mov %cr0, %rbx; mov %rbx, DATA", l1=l1)
    second = Vmcb(world.memory.view(OTHER))
    second.b[:] = world.vmcb.b
    second.rip = L2_CODE + 0x1000
    second.cr0 |= Cr0.am
    world.memory.write(L2_CODE + 0x1000, b"\x0f\x20\xc3\x0f\x01\xd9")
    second.b[0:4] = bytes((1, 0, 0, 0))
    world.run()
    assert second.exitcode == ExitCode.CR0_READ
    assert world.vmcb.exitcode == ExitCode.VMMCALL
    assert not world.data() & Cr0.am
    assert world.vmcb.rsp == L2_STACK


def test_changed_intercepts_hold_at_the_next_entry():
    l1 = """
        mov $VMCB12, %rax; vmrun %rax
        mov VMCB12 + 0x70, %rbx; mov %rbx, DATA
        andl $~0x40000, VMCB12 + 0xc
        vmrun %rax
        out %eax, $0xf4
    """
    world = World("at: cpuid; nop", wants=[Intercept.CPUID], l1=l1)
    world.run()
    assert world.data() == ExitCode.CPUID
    assert world.vmcb.exitcode == ExitCode.VMMCALL


@pytest.mark.parametrize("l1_prefix", ["", ".byte 0x67;"])
def test_an_address_size_prefix_narrows_rax(l1_prefix):
    high = (1 << 32) + VMCB12
    world = World("nop", l1=f"mov ${high:#x}, %rax; {l1_prefix} vmrun %rax; out %eax, $0xf4")
    world.run()
    if l1_prefix:
        assert world.vmcb.exitcode == ExitCode.VMMCALL
        assert world.vcpu.state.q[0] == high
    else:
        assert world.vcpu.nested.reason == "#VMEXIT(INVALID)"
