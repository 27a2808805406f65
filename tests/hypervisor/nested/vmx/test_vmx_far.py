"""Guest-physical addresses far above L1's memory."""

import pytest
from vmx_lab import DATA, EPT, EPT2

from undervisor.arch.vmx.exits import ExitReason as R
from undervisor.arch.vmx.fields import VmcsField as F

FAR = 1 << 39


@pytest.mark.parametrize("rights", [0, 1, 7])
def test_a_guest_physical_address_far_above_l1s_memory(lab, rights):
    """L2's own tables lead there, and EPT brings it back into RAM."""
    changes = lab.ept() | {F.GUEST_CR3: lab.pages()}
    gva = DATA
    lab.write_u64(lab.pte(gva), FAR | 0x67)
    lab.fill(EPT2, 0x3000)
    lab.write_u64(EPT + 8, EPT2 | 7)
    lab.write_u64(EPT2, (EPT2 + 0x1000) | 7)
    lab.write_u64(EPT2 + 0x1000, (EPT2 + 0x2000) | 7)
    lab.write_u64(EPT2 + 0x2000, DATA | 0x30 | rights)
    lab.write(DATA + 8, b"far away")
    lab.l1.invept(2)
    run = lab.run("mov 8(%rbx), %rax; mov %rax, 16(%rbx)", changes, {"rbx": gva})
    if rights == 7:
        assert run.reason is R.VMCALL
        assert lab.read(DATA + 16, 8) == b"far away"
        return
    assert run.reason is R.EPT_VIOLATION
    assert run[F.GUEST_PHYSICAL_ADDRESS] == FAR + (16 if rights else 8)
    assert run[F.GUEST_LINEAR_ADDRESS] == gva + (16 if rights else 8)
