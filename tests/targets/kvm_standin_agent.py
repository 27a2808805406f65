"""An agent on a stand-in for KVM, as a program: its guests are named by its argument."""

import os
import signal
import sys
import time

from kvm_standin import StandIn, echo, in_l2, says, sleeper

from undervisor.targets.kvm.agent import main


def crashes(cpu):
    """The process dies under its guest."""
    yield cpu.out(0x3F8, b"!")
    os.kill(os.getpid(), signal.SIGSEGV)
    yield "until kicked"


def halts(cpu):
    """HLT with interrupts off."""
    cpu.regs["rflags"], cpu.mp = 2, 3
    while True:
        yield "until kicked"


def floods(cpu):
    """Output without end."""
    while True:
        yield cpu.out(0x3F8, b"flood " * 300)


def hangs(cpu):
    """A KVM_RUN that does not come back, whatever is done to it."""
    yield cpu.out(0x3F8, b"last words\n")
    time.sleep(1000)


class NoKvm(StandIn):
    """A machine without the device."""

    def open(self):
        raise OSError(2, "No such file or directory")


KERNELS = {
    "says": lambda: StandIn(says(b"hello\n", 4)),
    "echo": lambda: StandIn(echo),
    "crashes": lambda: StandIn(crashes),
    "halts": lambda: StandIn(halts, sleeper),
    "floods": lambda: StandIn(floods),
    "hangs": lambda: StandIn(hangs),
    "sleeps": lambda: StandIn(sleeper),
    "l2": lambda: StandIn(in_l2),
    "none": NoKvm,
}

if __name__ == "__main__":
    main(sys.argv[2:], KERNELS[sys.argv[1]]())
