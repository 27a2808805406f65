"""Messages from one processor to another that runs, or waits in, an L2.

SDM 3C "Other Causes of VM Exits".
"""

import pytest
from vmx_lab import Lab

from undervisor.arch.vmx.exits import ExitReason as R
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.conformance.lab import together
from undervisor.conformance.vmx.lab import VmxLab
from undervisor.guest.asm import assemble
from undervisor.guest.probe.client import Batch

INIT, SIPI, NMI = 0x4500, 0x4642, 0x4400
WAIT_FOR_SIPI = 3


class Pair:
    """The second processor in VMX operation; the first sends it one message while its L2 runs."""

    def __init__(self):
        self.lab = Lab(cpus=2)
        self.lab.start_others(2)
        self.other = VmxLab(self.lab.probe, 1)
        self.other.on(like=self.lab)

    def send(self, command, changes, source="1: jmp 1b"):
        """The exit reason and qualification of the other's L2."""
        self.other.code(source)
        receiver, sender = Batch(), Batch()
        writes = self.other.plan_launch(receiver, changes)
        run = self.other.plan_entry(receiver, {}, resume=False)
        wait = "mov $100000, %ecx; 1: loop 1b; "
        icr = f"mov $0xfee00000, %r8d; movl $0x1000000, 0x310(%r8); {wait}"
        sender.call(assemble(f"{icr} movl ${command:#x}, 0x300(%r8); {wait}", 0), {}, [])
        together({self.lab: sender, self.other: receiver})
        writes.check()
        return R(run.reason), run.qualification


@pytest.fixture(scope="module")
def pair():
    return Pair()


def test_a_sipi_reaches_the_one_that_waits_for_it(pair):
    assert pair.send(SIPI, {F.GUEST_ACTIVITY_STATE: WAIT_FOR_SIPI}) == (R.STARTUP_IPI, 0x42)


def test_an_init_ends_a_running_l2(pair):
    assert pair.send(INIT, {F.GUEST_ACTIVITY_STATE: 0})[0] is R.INIT_SIGNAL


def test_an_nmi_ends_a_running_l2_where_l1_asks(pair):
    assert pair.send(NMI, pair.other.pin(nmi_exiting=1))[0] is R.EXCEPTION_OR_NMI


def test_a_sipi_is_lost_on_a_running_l2(pair):
    """L2 goes on to its VMCALL."""
    ends = "mov $400000, %ecx; 1: loop 1b"
    assert pair.send(SIPI, {F.GUEST_ACTIVITY_STATE: 0}, ends)[0] is R.VMCALL
