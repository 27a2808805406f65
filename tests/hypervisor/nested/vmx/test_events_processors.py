"""Messages from one processor to another that runs, or waits in, an L2.

SDM 3C "Other Causes of VM Exits".
"""

import pytest
from vmx_lab import CODE, STACK, Lab

from undervisor.arch.vmx.controls import PinBasedControls
from undervisor.arch.vmx.exits import ExitReason as R
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.guest.asm import assemble
from undervisor.guest.probe.client import Batch
from undervisor.guest.probe.vmx_setup import l2_fields, vmx_on

VMXON, VMCS, SCRATCH = 0x700000, 0x701000, 0x702000
INIT, SIPI, NMI = 0x4500, 0x4642, 0x4400
WAIT_FOR_SIPI = 3


class Pair:
    """The second processor in VMX operation; the first sends it one message while its L2 runs."""

    def __init__(self):
        self.lab = Lab(cpus=2)
        self.lab.probe.start_aps([1])
        self.other = self.lab.probe.on(1)
        self.facts = vmx_on(self.other, VMXON, VMCS)
        self.fields = l2_fields(self.facts, CODE, STACK, processor=1)
        self.launched = False

    def send(self, command, changes, source="1: jmp 1b"):
        """The exit reason and qualification of the other's L2."""
        self.lab.memory.write(CODE, assemble(source, CODE).bytes)
        receiver, sender = Batch(), Batch()
        receiver.vmwrites(self.fields | changes, SCRATCH)
        receiver.vmx_run({}, resume=self.launched)
        self.launched = True
        reason = receiver.vmread(F.EXIT_REASON)
        qualification = receiver.vmread(F.EXIT_QUALIFICATION)
        wait = "mov $100000, %ecx; 1: loop 1b; "
        icr = f"mov $0xfee00000, %r8d; movl $0x1000000, 0x310(%r8); {wait}"
        sender.call(assemble(f"{icr} movl ${command:#x}, 0x300(%r8); {wait}", 0), {}, [])
        self.lab.probe.together({0: sender, 1: receiver})
        return R(reason.value.value), qualification.value.value


@pytest.fixture(scope="module")
def pair():
    return Pair()


def test_a_sipi_reaches_the_one_that_waits_for_it(pair):
    assert pair.send(SIPI, {F.GUEST_ACTIVITY_STATE: WAIT_FOR_SIPI}) == (R.STARTUP_IPI, 0x42)


def test_an_init_ends_a_running_l2(pair):
    assert pair.send(INIT, {F.GUEST_ACTIVITY_STATE: 0})[0] is R.INIT_SIGNAL


def test_an_nmi_ends_a_running_l2_where_l1_asks(pair):
    pin = pair.fields[F.PIN_BASED_CONTROLS] | PinBasedControls.nmi_exiting
    assert pair.send(NMI, {F.PIN_BASED_CONTROLS: pin})[0] is R.EXCEPTION_OR_NMI


def test_a_sipi_is_lost_on_a_running_l2(pair):
    """L2 goes on to its VMCALL."""
    ends = "mov $400000, %ecx; 1: loop 1b; vmcall"
    assert pair.send(SIPI, {F.GUEST_ACTIVITY_STATE: 0}, ends)[0] is R.VMCALL
