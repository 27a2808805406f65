"""The probe on real emulators: every way to start it, faults as values, L2s, other processors."""

import random
import struct

import pytest
from guest_machines import needs_bochs, needs_qemu, qemu

from undervisor.arch.svm.vmcb import Vmcb, VmcbField
from undervisor.guest.asm import assemble
from undervisor.guest.disk import disk_image, iso_image
from undervisor.guest.elf_writer import note, write_elf
from undervisor.guest.image import Image
from undervisor.guest.placement import Segment
from undervisor.guest.probe.answers import Fault, Refused, VmxOutcome
from undervisor.guest.probe.batch import HEADER, Op
from undervisor.guest.probe.client import Batch, Probe, ProbeSilent
from undervisor.guest.probe.program import BASE, FREE, USER, Block, program
from undervisor.guest.probe.protocol import Kind, Status, request_bytes
from undervisor.guest.probe.svm_setup import l2_vmcb, svm_on
from undervisor.guest.probe.vmx_setup import l2_fields, vmx_on
from undervisor.targets import Job
from undervisor.targets.bochs import BochsTarget, Firmware
from undervisor.targets.qemu import QemuTarget

qemu_test = [pytest.mark.qemu, needs_qemu]
bochs_test = [pytest.mark.bochs, needs_bochs]


MEMORY = 32 << 20


def probe_job(cpus=1):
    return Job(Image.parse(program().elf, "probe"), cpus, MEMORY)


def placement():
    return probe_job().place()


def pvh_image():
    """The same code without a Multiboot header, so that QEMU takes the PVH entry."""
    code = bytes(12) + program().code.bytes[12:]
    start = program().code.labels["start"]
    xen = note(b"Xen\0", 18, struct.pack("<Q", start))
    return write_elf([Segment(BASE, code, FREE - BASE)], start, xen, 64)


MEDIA = {
    "multiboot": lambda: (["-kernel", "medium"], program().elf),
    "pvh": lambda: (["-kernel", "medium"], pvh_image()),
    "disk": lambda: (["-drive", "file=medium,format=raw,if=ide"], disk_image(placement())),
    "cdrom": lambda: (["-cdrom", "medium", "-boot", "d"], iso_image(placement())),
}


def connected(line):
    probe = Probe(line, answer_time=20)
    probe.wait_for_hello()
    return probe


@pytest.fixture
def on_qemu():
    with QemuTarget("EPYC,+svm").start(probe_job(3)) as line:
        yield connected(line)


def ask(probe, operation, *arguments):
    batch = Batch()
    answer = operation(batch, *arguments)
    probe.run(batch)
    return answer.outcome


def vendor(probe):
    leaf = ask(probe, Batch.cpuid, 0)
    return struct.pack("<3I", leaf["rbx"], leaf["rdx"], leaf["rcx"])


class TestOnQemu:
    pytestmark = qemu_test

    @pytest.mark.parametrize("medium", MEDIA)
    def test_it_starts_from(self, medium):
        options, data = MEDIA[medium]()
        with qemu(options, {"medium": data}) as line:
            probe = connected(line)
            assert vendor(probe) == b"AuthenticAMD"
            assert probe.booted_by_multiboot == (medium != "pvh")

    def test_faults_are_values_and_the_batch_goes_on(self, on_qemu):
        batch = Batch()
        undefined = batch.call(bytes.fromhex("90 0f0b"))
        vmx = batch.vmxon(FREE)
        page = batch.read(1 << 40, 8)
        selector = batch.call(assemble("mov $0x1230, %eax; ltr %ax"))
        divide = batch.call(assemble("xor %ecx, %ecx; div %ecx"), {"rax": 77})
        after = batch.rdmsr(0xC0000080)
        on_qemu.run(batch)
        assert undefined.fault.vector == 6
        assert undefined.fault.rip == Block(0).base + 0x1000 + 1
        assert vmx.fault.vector == 6
        assert (page.fault.vector, page.fault.cr2) == (14, 1 << 40)
        assert (selector.fault.vector, selector.fault.error_code) == (13, 0x1230)
        assert (divide.fault.vector, divide.fault.registers["rax"]) == (0, 77)
        assert after.value & 0x500 == 0x500

    def test_registers_and_flags_go_in_and_out(self, on_qemu):
        given = {n: 0x1111 * i for i, n in enumerate(("rax", "rcx", "rbp", "r8", "r15"), 1)}
        batch = Batch()
        same = batch.call("nothing", given | {"rflags": 0x8D7})
        total = batch.call(assemble("add %rcx, %rax"), given, ["rax"])
        on_qemu.run(batch)
        assert {n: same.value[n] for n in given} == given
        assert same.value["rbx"] == 0
        assert same.value.rflags == 0x8D7
        assert total.value.registers == {"rax": 0x3333}

    def test_memory_is_read_written_filled_and_copied(self, on_qemu):
        batch = Batch()
        batch.fill(FREE, 64, 0xAA)
        batch.write(FREE + 8, b"0123456789")
        batch.copy(FREE + 12, FREE + 8, 10)
        batch.copy(FREE + 40, FREE + 8, 4)
        batch.poke(FREE + 60, 0x12345678)
        word = batch.peek(FREE + 60, 16)
        found = batch.read(FREE, 64)
        on_qemu.run(batch)
        want = bytearray(b"\xaa" * 64)
        want[8:22] = b"01230123456789"
        want[40:44] = b"0123"
        want[60:64] = struct.pack("<I", 0x12345678)
        assert found.value == bytes(want)
        assert word.value == 0x5678

    def test_ports_and_control_registers(self, on_qemu):
        batch = Batch()
        batch.outp(0x70, 0x0D)
        valid_ram = batch.inp(0x71)
        batch.write_cr(2, 0x123456789ABC)
        cr2 = batch.read_cr(2)
        batch.write_dr(0, 0x4000)
        dr0 = batch.read_dr(0)
        on_qemu.run(batch)
        assert (valid_ram.value, cr2.value, dr0.value) == (0x80, 0x123456789ABC, 0x4000)

    def test_code_runs_at_cpl_3_and_comes_back_by_a_fault(self, on_qemu):
        code = assemble("mov %cs, %eax; hlt")
        batch = Batch()
        batch.write(USER, code.bytes)
        enter = assemble("push $0x2b; push %rsi; push $2; push $0x23; push %rdi; iretq")
        user = batch.call(enter, {"rdi": USER, "rsi": USER + 0x1000}, ["rax"])
        on_qemu.run(batch)
        assert isinstance(user.outcome, Fault)
        assert (user.outcome.vector, user.outcome.cs) == (13, 0x23)
        assert user.outcome.registers["rax"] == 0x23

    def test_interrupts_are_counted_and_an_unusable_stack_does_no_harm(self, on_qemu):
        batch = Batch()
        before = batch.peek(Block(0).counts + 4 * 0x55)
        batch.send_ipi(0, 0x4055)
        batch.call("window")
        after = batch.peek(Block(0).counts + 4 * 0x55)
        lost = batch.call(assemble("xor %esp, %esp; dec %rsp; shl $20, %rsp; push %rax"))
        on_qemu.run(batch)
        assert after.value == before.value + 1
        assert lost.fault.vector in (12, 14)

    def test_garbage_before_a_request_does_no_harm(self, on_qemu):
        for garbage in (b"hello\r\n", bytes(100), b"\x31\xab\x56\x7e" * 3, b"\xff" * 5000):
            on_qemu.stream.send(garbage)
            assert vendor(on_qemu) == b"AuthenticAMD"

    def test_requests_without_sense_are_answered(self, on_qemu):
        rng = random.Random(7)
        unknown = [HEADER.pack(rng.randrange(7, 1 << 16), 0, 0) for _ in range(20)]
        short = [HEADER.pack(op, 0, n) + bytes(n) for op in range(7) for n in range(4)]
        lying = [HEADER.pack(Op.READ, 0, 1 << 31), HEADER.pack(Op.WRITE, 0, 9) + bytes(8)]
        requests = [(b"".join(unknown), 20), (b"".join(short), 28), (bytes(3), 0), (b"", 0)]
        requests += [(payload, 0) for payload in lying]
        for payload, count in requests:
            answers = on_qemu._ask(payload, 10)
            statuses = [status for _, status, _ in HEADER.iter_unpack(answers)]
            assert statuses == [Status.UNKNOWN] * count
        assert vendor(on_qemu) == b"AuthenticAMD"

    def test_a_damaged_request_is_not_executed(self, on_qemu):
        batch = Batch()
        batch.fill(FREE, 8)
        on_qemu.run(batch)
        batch = Batch()
        batch.write(FREE, b"executed")
        data = bytearray(request_bytes(999, batch.requests[0].data))
        data[20] ^= 1
        on_qemu.stream.send(bytes(data))
        assert ask(on_qemu, Batch.read, FREE, 8) == bytes(8)

    def test_a_repeated_request_is_answered_and_not_executed_again(self, on_qemu):
        batch = Batch()
        batch.call(assemble("incl (%rdi)"), {"rdi": FREE + 64}, [])
        before = ask(on_qemu, Batch.peek, FREE + 64)
        sent = []
        on_qemu.stream.send, send = (lambda d: (sent.append(d), send(d))), on_qemu.stream.send
        on_qemu.run(batch)
        on_qemu.stream.send = send
        send(sent[0])
        frame = on_qemu._await(Kind.RESPONSE, 10)
        assert frame.sequence == on_qemu._sequence
        assert ask(on_qemu, Batch.peek, FREE + 64) == before + 1

    def test_processors_run_batches_at_the_same_time(self, on_qemu):
        assert on_qemu.start_aps([1, 2]) == 3
        code = "lock incl (%rdi); 1: pause; cmpl $3, (%rdi); jb 1b"
        batches = {number: Batch() for number in range(3)}
        apic, undefined = {}, {}
        for number, batch in batches.items():
            apic[number] = batch.apic_read(0x20)
            # Each waits until all three have come here.
            batch.call(assemble(code), {"rdi": FREE + 128}, [])
            undefined[number] = batch.call(bytes.fromhex("0f0b"))
        on_qemu.together(batches)
        assert sorted(answer.value >> 24 for answer in apic.values()) == [0, 1, 2]
        assert [answer.fault.vector for answer in undefined.values()] == [6, 6, 6]
        slots = [answer.fault.rip & -0x20000 for answer in undefined.values()]
        assert slots == [Block(number).base for number in range(3)]

    def test_an_l2_runs_on_every_processor_at_once(self, on_qemu):
        on_qemu.start_aps([1, 2])
        code = assemble("lock incl (%rdi); 1: pause; cmpl $3, (%rdi); jb 1b; vmmcall")
        on_qemu.load(L2, code.bytes)
        batches, runs, codes = {}, {}, {}
        for number in range(3):
            page = FREE + 0x20000 + number * 0x2000
            l1 = svm_on(on_qemu.on(number), page)
            on_qemu.load(page + 0x1000, bytes(l2_vmcb(l1, L2, 0)))
            batch = batches[number] = Batch()
            runs[number] = batch.svm_run(page + 0x1000, {"rdi": FREE + 256, "rbx": number})
            codes[number] = batch.peek(page + 0x1070)
        on_qemu.together(batches)
        assert [answer.value for answer in codes.values()] == [0x81] * 3
        assert [run.value.registers["rbx"] for run in runs.values()] == [0, 1, 2]

    def test_a_large_batch_runs_on_another_processor_in_portions(self, on_qemu):
        on_qemu.start_aps([1])
        batch = Batch()
        for page in range(4):
            batch.fill(FREE + page * 0x6000, 0x6000, page + 1)
        found = [batch.read(FREE + page * 0x6000, 0x6000) for page in range(4)]
        on_qemu.on(1).run(batch)
        assert [answer.value for answer in found] == [bytes([n]) * 0x6000 for n in (1, 2, 3, 4)]

    def test_a_processor_that_does_not_run_is_refused(self, on_qemu):
        batch = Batch()
        answer = batch.post(9, Batch())
        on_qemu.run(batch)
        assert isinstance(answer.outcome, Refused)

    def test_a_processor_that_never_finishes_is_said_to(self, on_qemu):
        on_qemu.start_aps([1])
        batch = Batch()
        batch.call(assemble("1: pause; jmp 1b"))
        with pytest.raises(ProbeSilent, match="processor 1 has not finished its batch in 1 s"):
            on_qemu.together({1: batch}, timeout=1)
        assert vendor(on_qemu) == b"AuthenticAMD"

    def test_every_routine_returns_or_faults(self, on_qemu):
        batch = Batch()
        answers = {
            name: batch.call(name, {"rdi": FREE, "rax": FREE, "rsi": FREE})
            for name in ROUTINES
            if name not in FATAL
        }
        on_qemu.run(batch)
        faults = {name for name, answer in answers.items() if answer.fault}
        assert {"vmxon", "vmread", "vmlaunch_run", "invept", "vmrun", "stgi"} <= faults
        assert not {"nothing", "cpuid", "rdmsr", "read_cr8", "peek64", "window"} & faults
        assert vendor(on_qemu) == b"AuthenticAMD"

    def test_an_svm_l2_runs_and_exits_by_vmmcall(self, on_qemu):
        svm_l2(on_qemu)


ROUTINES = sorted(label[3:] for label in program().code.labels if label.startswith("do_"))
# What takes the machine, or the probe's own footing, away when it is called with zeros.
FATAL = {
    "wait",
    "start_ap",
    "send_ipi",
    "apic_write",
    "wrmsr",
    "skinit",
    "write_cr0",
    "write_cr3",
    "write_cr4",
    "out8",
    "out16",
    "out32",
}


VMCB, HSAVE, L2 = FREE + 0x10000, FREE + 0x11000, FREE + 0x12000
VMXON, VMCS, SCRATCH = FREE + 0x13000, FREE + 0x14000, FREE + 0x15000


def svm_l2(probe):
    code = assemble("add $1, %rbx; mov %rbx, %rcx; mov $5, %eax; vmmcall; hlt")
    l1 = svm_on(probe, HSAVE)
    batch = Batch()
    batch.write(VMCB, bytes(l2_vmcb(l1, L2, L2 + 0x1000)))
    batch.write(L2, code.bytes)
    run = batch.svm_run(VMCB, {"rbx": 41, "r15": 15})
    after = batch.read(VMCB, 4096)
    probe.run(batch)
    vmcb = Vmcb(after.value)
    assert vmcb[VmcbField.EXITCODE] == 0x81
    assert run.value.registers["rcx"] == 42
    assert run.value.registers["r15"] == 15
    assert vmcb[VmcbField.RAX] == 5
    assert vmcb[VmcbField.RIP] == L2 + len(code) - 4
    assert ask(probe, Batch.read_cr, 3) == l1.cr3


def vmx_l2(probe):
    code = assemble("add $1, %rbx; mov %rbx, %rcx; mov $5, %eax; vmcall; hlt")
    facts = vmx_on(probe, VMXON, VMCS)
    batch = Batch()
    batch.write(L2, code.bytes)
    early = batch.vmx_run(resume=True)
    written = batch.vmwrites(l2_fields(facts, L2, L2 + 0x1000), SCRATCH)
    run = batch.vmx_run({"rbx": 41, "r15": 15})
    after = batch.vmreads([0x4402, 0x681E, 0x440C, 0x7FFE], SCRATCH)
    batch.vmwrite(0x681E, L2 + len(code) - 1)
    again = batch.vmx_run(resume=True)
    reason = batch.vmread(0x4402)
    current = batch.vmptrst()
    off = batch.vmxoff()
    outside = batch.vmread(0x4402)
    probe.run(batch)
    assert (early.value.result.outcome, early.value.result.error) == (VmxOutcome.FAIL_VALID, 5)
    count, outcome = written.value
    assert outcome.succeeded, (count, outcome)
    assert run.value.result.succeeded, run.value.result
    assert run.value.registers["rcx"] == 42
    assert run.value.registers["rax"] == 5
    assert run.value.registers["r15"] == 15
    assert after.value == {0x4402: 18, 0x681E: L2 + len(code) - 4, 0x440C: 3, 0x7FFE: None}
    assert again.value.result.succeeded
    assert reason.value.value == 12
    assert current.value.value == VMCS
    assert off.value.succeeded
    assert outside.fault.vector == 6


class TestOnBochs:
    pytestmark = bochs_test

    def test_an_svm_l2_runs_on_each_of_two_processors(self):
        with BochsTarget("amd", Firmware.BIOS).start(probe_job(2)) as line:
            probe = connected(line)
            assert vendor(probe) == b"AuthenticAMD"
            assert probe.start_aps([1]) == 2
            svm_l2(probe)

    def test_a_vmx_l2_runs_and_exits_by_vmcall(self):
        with BochsTarget("intel", Firmware.BIOS).start(probe_job()) as line:
            probe = connected(line)
            assert vendor(probe) == b"GenuineIntel"
            vmx_l2(probe)
