"""The prompt's names: instructions as functions, VMCS and VMCB as objects, exits in words."""

import os
import rlcompleter
import signal

import pytest

from undervisor.arch.svm.exits import ExitCode as SvmCode
from undervisor.arch.svm.intercepts import Intercept
from undervisor.arch.vmx.controls import PrimaryControls
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField
from undervisor.arch.x86.msr import Msr
from undervisor.errors import BadInput, GuestDied, SiliconDied, TimedOut
from undervisor.shell.machine import Machine, Refused
from undervisor.shell.namespace import Namespace
from undervisor.shell.places import YOURS
from undervisor.targets.builtin import BuiltinTarget


def started(cpu, cpus=2, seconds=20):
    return Namespace(Machine(BuiltinTarget(cpu), cpus, seconds))


class Names:
    """The prompt's names as attributes."""

    def __init__(self, space):
        self.__dict__ |= space.names
        self.space = space


@pytest.fixture(scope="module")
def intel_machine():
    space = started("intel")
    yield space
    space.machine.close()


@pytest.fixture(scope="module")
def amd_machine():
    space = started("amd")
    yield space
    space.machine.close()


@pytest.fixture
def intel(intel_machine):
    intel_machine.reboot()
    return Names(intel_machine)


@pytest.fixture
def amd(amd_machine):
    amd_machine.reboot()
    return Names(amd_machine)


# -- instructions ------------------------------------------------------------------------------


def test_values_are_shown_in_hexadecimal_and_faults_in_their_place(intel):
    assert repr(intel.rdmsr("IA32_EFER")) == "0x500"
    assert intel.rdmsr(Msr.EFER) == intel.rdmsr(0xC0000080) == 0x500
    fault = intel.rdmsr(0x12345)
    assert repr(fault).startswith("#GP(0x0) at rip 0x")
    assert (fault.vector, bool(fault)) == (13, False)
    assert intel.wrmsr("star", 5) is None
    assert intel.rdmsr("star") == 5
    assert repr(intel.wrmsr(Msr.EFER, 1 << 63)).startswith("#GP(0x0)")
    assert repr(intel.cpuid(0)).endswith("ebx=0x756e6547  ecx=0x6c65746e  edx=0x49656e69")
    assert intel.read_cr(4) == intel.call("mov %cr4, %rax")["rax"]
    intel.write_dr(0, 0x1234)
    assert intel.read_dr(0) == 0x1234
    intel.outp(0x70, 0x0D)
    assert intel.inp(0x71) == 0x80


def test_names_that_are_none_are_told(intel):
    with pytest.raises(BadInput, match="no MSR is called nonsense"):
        intel.rdmsr("nonsense")
    with pytest.raises(BadInput, match="no control register 5"):
        intel.read_cr(5)
    with pytest.raises(AttributeError, match="no VMCS field guest_nonsense"):
        intel.vmcs.guest_nonsense = 1
    with pytest.raises(AttributeError, match="no register eax"):
        intel.regs.eax = 1
    with pytest.raises(BadInput, match="line 1: invalid instruction"):
        intel.call("frobnicate")


def test_code_runs_with_registers_and_its_faults_are_values(intel):
    done = intel.call("add %rcx, %rax", rax=2, rcx=3)
    assert done["rax"] == 5
    assert "rax 0x0000000000000005" in repr(done)
    assert repr(intel.call("ud2")).startswith("#UD at rip 0x")
    assert intel.call(intel.asm("mov $9, %eax"))["rax"] == 9


def test_memory_is_read_as_a_dump_and_written(intel):
    data = bytes(range(256)) * 256
    assert intel.mem.write(YOURS, data) is None
    assert intel.mem.read(YOURS, len(data)) == data
    assert intel.mem.write(YOURS, b"hello, L2") is None
    dump = repr(intel.mem.read(YOURS, 32)).splitlines()
    assert dump[0].startswith(f"{YOURS:08x}  68 65 6c 6c 6f")
    assert dump[0].endswith(" hello, L2.......")
    assert len(dump) == 2
    assert intel.mem.write(YOURS, 0x1234, 16) is None
    assert intel.mem.peek(YOURS, 16) == 0x1234
    assert intel.mem.fill(YOURS, 4, 0xFF) is None
    assert intel.mem.poke(YOURS + 1, 0, 8) is None
    assert intel.mem.read(YOURS, 4) == b"\xff\0\xff\xff"
    assert "for linear address 0x10000000000" in repr(intel.mem.read(1 << 40, 8))
    assert "#PF" in repr(intel.mem.write(1 << 40, b"x"))


# -- VMX ---------------------------------------------------------------------------------------


def test_before_vmx_is_on_everything_says_so(intel):
    assert repr(intel.vmx) == "VMX is off: vmx.on()"
    assert repr(intel.vmcs.guest_rip).endswith("(vmx.on() comes first)")
    assert repr(intel.vmx.launch()).startswith("#UD at rip")
    assert repr(intel.vmcs).startswith("VMREAD: #UD at rip")
    with pytest.raises(Refused, match="VMWRITE of GUEST_RIP: #UD at rip"):
        intel.vmcs.guest_rip = 0
    with pytest.raises(Refused, match="not known yet"):
        intel.vmx.adjust("primary_controls", 0)


def test_an_l2_runs_exits_and_is_resumed(intel):
    assert "VMX operation" in repr(intel.vmx.on())
    assert "GUEST_RIP and GUEST_RSP are set" in repr(intel.l2("inc %rbx; vmcall; mov %rbx, %rax"))
    exit = intel.vmx.launch(rbx=41)
    assert (exit.entered, exit.reason) == (True, ExitReason.VMCALL)
    assert repr(exit).startswith("VM exit, exit reason 18: VMCALL\n")
    assert "instruction length 3" in repr(exit)
    assert intel.regs.rbx == 42
    assert exit.rip + 3 == intel.vmx.skip() == intel.vmcs.guest_rip
    intel.l2("mov %rbx, %rax; cpuid")
    exit = intel.vmx.run()
    assert exit.reason is ExitReason.CPUID
    assert intel.regs.rax == 42
    assert intel.vmx.last is exit


def test_the_vmcs_shows_what_has_changed_decoded(intel):
    intel.vmx.on()
    assert repr(intel.vmcs) == "nothing has changed"
    intel.vmcs.primary_controls |= PrimaryControls.rdtsc_exiting
    text = repr(intel.vmcs)
    assert text.startswith("primary_controls ")
    assert "(was 0x" in text.splitlines()[0]
    assert "RDTSC exiting" in text
    assert "guest_rip" not in text
    assert "guest_rip" in repr(intel.vmcs.all())
    intel.l2("rdtsc")
    assert intel.vmx.launch().reason is ExitReason.RDTSC
    assert "exit_reason " in repr(intel.vmcs)


def test_fields_go_by_attribute_encoding_and_other_peoples_names(intel):
    intel.vmx.on()
    intel.vmcs.guest_rsp = 0x1234
    assert intel.vmcs[VmcsField.GUEST_RSP] == intel.vmcs["GuestRSP"] == 0x1234
    intel.vmcs["guest-RSP"] = 0x4321
    assert intel.vmcs.guest_rsp == 0x4321
    assert "VMfailValid, VM-instruction error 12" in repr(intel.vmcs[0x7FF0])
    with pytest.raises(Refused, match=r"VMWRITE of field 0x7ff0: .*VM-instruction error 12"):
        intel.vmcs[0x7FF0] = 5


def test_a_failed_entry_names_every_broken_rule_in_the_words_of_explain(intel):
    intel.vmx.on()
    intel.vmcs.set(guest_rflags=0, guest_cr3=1 << 60, host_cs_selector=0)
    failed = intel.vmx.launch()
    assert not failed
    assert failed.error == 8
    assert failed.broken[0].startswith("vmx.host.")
    assert {"vmx.guest.rflags.bit-1", "vmx.guest.cr3.width"} <= set(failed.broken)
    text = repr(failed)
    assert "VM-instruction error 8: VM entry with invalid host-state field(s)" in text
    assert (
        "  vmx.guest.rflags.bit-1: Bit 1 of GUEST_RFLAGS must be 1\n      GUEST_RFLAGS = 0x0"
        in text
    )
    intel.vmcs.host_cs_selector = 8
    failed = intel.vmx.launch()
    assert failed.error == 0
    assert "exit reason 0x80000021: ENTRY_FAILURE_INVALID_GUEST_STATE" in repr(failed)
    intel.vmcs.set(guest_rflags=2, guest_cr3=intel.read_cr(3))
    assert intel.vmx.launch().reason is ExitReason.HLT


def test_an_entry_with_the_wrong_instruction_is_told_with_its_remedy(intel):
    intel.vmx.on()
    failed = intel.vmx.resume()
    assert (failed.error, failed.broken) == (5, [])
    assert "→ use VMLAUNCH the first time" in repr(failed)
    intel.vmx.clear()
    assert "VMfailInvalid: there is no current VMCS" in repr(intel.vmx.launch())
    assert repr(intel.vmx.ptrld()) == "VMsucceed"
    assert intel.vmx.launch().reason is ExitReason.HLT
    assert intel.vmx.ptrst() == 0x601000
    assert repr(intel.vmx.off()) == "VMsucceed"
    assert "vmx.on() comes first" in repr(intel.vmcs.guest_rip)


def test_control_words_are_adjusted(intel):
    intel.vmx.on()
    value = intel.vmx.adjust("primary_controls", PrimaryControls.hlt_exiting)
    assert value & PrimaryControls.hlt_exiting
    assert value == intel.vmcs.primary_controls
    with pytest.raises(BadInput, match="no control word"):
        intel.vmx.adjust("guest_rip", 0)


def test_an_exit_with_a_qualification_is_decoded(intel):
    intel.vmx.on()
    intel.vmcs.primary_controls |= PrimaryControls.unconditional_io_exiting
    intel.l2("mov $0x80, %dx; out %al, %dx")
    exit = intel.vmx.launch()
    assert exit.reason is ExitReason.IO_INSTRUCTION
    assert exit.qualification >> 16 == 0x80
    assert "Port number = 0x80" in repr(exit)
    intel.vmcs.exception_bitmap = 1 << 6
    intel.l2("ud2")
    assert "interruption information 0x80000306" in repr(intel.vmx.resume())


# -- SVM ---------------------------------------------------------------------------------------


def test_before_svm_is_on_everything_says_so(amd):
    assert repr(amd.svm) == "SVM is off: svm.on()"
    assert repr(amd.vmcb) == "no VMCB: svm.on() comes first"
    assert repr(amd.svm.run()).endswith("(svm.on() comes first)")
    with pytest.raises(Refused, match="there is no VMCB"):
        amd.vmcb.rip = 0


def test_an_l2_runs_to_its_intercepts(amd):
    assert "SVM is on" in repr(amd.svm.on())
    amd.l2("add %rax, %rbx; cpuid; vmmcall")
    amd.vmcb.intercept(Intercept.CPUID)
    assert repr(amd.vmcb.intercepts()) == "CPUID, HLT, VMRUN, VMMCALL"
    exit = amd.svm.run(rax=2, rbx=40)
    assert (exit.entered, exit.code) == (True, SvmCode.CPUID)
    assert repr(exit).startswith("#VMEXIT, exit code 0x72: VMEXIT_CPUID\n")
    assert amd.regs.rbx == exit.registers["rbx"] == 42
    assert amd.svm.skip() == amd.vmcb.rip == exit.rip + 2
    assert amd.svm.run().code is SvmCode.VMMCALL
    amd.vmcb.intercept(Intercept.CPUID, on=False)
    amd.l2("cpuid; vmmcall")
    assert amd.svm.run().code is SvmCode.VMMCALL


def test_the_vmcb_shows_what_has_changed_decoded(amd):
    amd.svm.on()
    assert repr(amd.vmcb) == "nothing has changed"
    amd.vmcb.eventinj = 0x80000306
    assert repr(amd.vmcb).splitlines()[0].split() == ["eventinj", "0x80000306", "(was", "0x0)"]
    assert "error code valid" not in repr(amd.vmcb)
    assert "0x6" in repr(amd.vmcb)
    assert amd.vmcb["event_inj"] == amd.vmcb[0xA8] == 0x80000306
    amd.vmcb["eventinj"] = 0
    assert "intercept_word4" in repr(amd.vmcb.all())
    with pytest.raises(ValueError, match="does not fit CPL, 8 bits"):
        amd.vmcb.cpl = 0x100


def test_a_failed_vmrun_names_every_broken_rule(amd):
    amd.svm.on()
    amd.vmcb.set(guest_asid=0, efer=0)
    failed = amd.svm.run()
    assert not failed
    assert {"svm.asid.zero", "svm.efer.svme"} <= set(failed.broken)
    assert "svm.asid.zero: The guest's ASID must not be 0" in repr(failed)
    assert "VMEXIT_INVALID (-1)" in repr(failed)


def test_the_other_instructions_of_svm(amd):
    amd.svm.on()
    for done in (amd.svm.clgi(), amd.svm.stgi(), amd.svm.vmsave(), amd.svm.vmload()):
        assert done is None
    assert amd.svm.invlpga(0x1000, 1) is None
    assert repr(amd.svm.vmload(1)).startswith("#GP(0x0)")
    assert amd.svm.off() is None
    assert repr(amd.svm.clgi()).startswith("#UD")


def test_the_wrong_vendor_is_told(intel, amd):
    with pytest.raises(Refused, match="no SVM: it is GenuineIntel"):
        intel.svm.on()
    with pytest.raises(Refused, match="no VMX: it is AuthenticAMD"):
        amd.vmx.on()


# -- other processors, and the end of the machine ----------------------------------------------


def test_another_processor_has_its_own_vmcs(intel):
    intel.vmx.on()
    other = intel.cpu(1)
    assert repr(other) == "<processor 1>"
    assert other.cpuid(1).ebx >> 24 == 1
    other.vmx.on()
    other.l2("mov $1, %ebx; hlt")
    assert other.vmx.launch().reason is ExitReason.HLT
    assert other.regs.rbx == 1
    assert intel.regs.rbx == 0
    assert intel.vmcs.guest_rip != other.vmcs.guest_rip
    assert intel.cpu(0).vmcs is intel.vmcs
    with pytest.raises(BadInput, match="no processor 2: there are 2"):
        intel.cpu(2)


def test_a_dead_machine_says_so_until_it_is_started_anew(intel):
    intel.vmx.on()
    intel.regs.rbx = 5
    with pytest.raises(GuestDied, match="the machine is dead: triple fault") as death:
        intel.call("mov %rax, %cr3", rax=0x5000000)
    assert death.value.hint == "reboot() starts anew"
    with pytest.raises(GuestDied, match="the machine is dead: triple fault"):
        intel.cpuid(0)
    assert "started anew" in repr(intel.reboot())
    assert intel.regs.rbx == 0
    assert repr(intel.vmx) == "VMX is off: vmx.on()"
    intel.vmx.on()
    assert intel.vmx.launch().reason is ExitReason.HLT


def test_an_l2_that_does_not_exit_is_told_after_the_limit():
    space = started("amd", 1, seconds=1)
    try:
        names = Names(space)
        names.svm.on()
        names.l2("jmp .")
        with pytest.raises(TimedOut, match=r"no answer in 1 s.*an L2 that does not exit"):
            names.svm.run()
        space.reboot()
        assert names.svm.on()
    finally:
        space.machine.close()


def test_a_target_that_crashes_is_told(intel):
    os.kill(intel.space.machine._running.pid, signal.SIGKILL)
    with pytest.raises(SiliconDied, match="the machine is dead: the processor library died"):
        intel.cpuid(0)


# -- the prompt --------------------------------------------------------------------------------


def test_the_banner_fits_on_one_screen(intel, amd):
    for names, word in ((intel, "vmx.launch()"), (amd, "svm.run()")):
        lines = names.space.banner().splitlines()
        assert word in "\n".join(lines)
        assert len(lines) <= 23
        assert max(map(len, lines)) <= 80


def test_completion_finds_fields_without_reading_them(intel):
    completer = rlcompleter.Completer(intel.space.names)
    before = intel.space.machine.run
    intel.space.machine.run = None  # whoever asks the machine now fails
    try:
        assert completer.attr_matches("vmcs.guest_ri") == ["vmcs.guest_rip"]
        assert completer.attr_matches("vmcb.exitinfo") == ["vmcb.exitinfo1", "vmcb.exitinfo2"]
        assert completer.attr_matches("regs.r11") == ["regs.r11"]
        assert completer.attr_matches("vmx.lau") == ["vmx.launch("]
    finally:
        intel.space.machine.run = before
