"""States that hypervisors really enter, and the ways in which people really fail."""

from undervisor.arch.vmx.boundary import valid_state
from undervisor.arch.vmx.checks import check_vm_entry
from undervisor.arch.vmx.controls import EntryControls, SecondaryControls
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.vmx.fields import guest_segment

UNUSABLE = 0x1_0000


def segment(register, selector, base, limit, rights):
    values = {"SELECTOR": selector, "BASE": base, "LIMIT": limit, "ACCESS_RIGHTS": rights}
    return {guest_segment(register, part): value for part, value in values.items()}


def broken(state):
    verdict = check_vm_entry(state)
    assert verdict.unchecked == []
    return {violation.rule.id for violation in verdict.broken}


def after_reset():
    """A processor at its reset vector, as an unrestricted guest."""
    state = valid_state("real")
    for register in ("SS", "DS", "ES", "FS", "GS"):
        state |= segment(register, 0, 0, 0xFFFF, 0x93)
    state |= segment("CS", 0xF000, 0xFFFF_0000, 0xFFFF, 0x9B)
    state |= segment("LDTR", 0, 0, 0xFFFF, 0x82)
    state |= segment("TR", 0, 0, 0xFFFF, 0x8B)
    return state | {
        F.GUEST_CR0: 0x6000_0030,
        F.GUEST_CR3: 0,
        F.GUEST_CR4: 0x2000,
        F.GUEST_RIP: 0xFFF0,
        F.GUEST_RSP: 0,
        F.GUEST_RFLAGS: 2,
    }


def linux_process():
    """A 64-bit Linux guest in user mode: unusable data segments, per-thread FS base."""
    state = valid_state("long")
    for register in ("DS", "ES", "FS", "GS"):
        state |= segment(register, 0, 0, 0xFFFF_FFFF, 0x1_C000)
    state |= segment("CS", 0x33, 0, 0xFFFF_FFFF, 0xA0FB)
    state |= segment("SS", 0x2B, 0, 0xFFFF_FFFF, 0xC0F3)
    state |= segment("TR", 0x40, 0xFFFF_FE00_0000_3000, 0x4087, 0x8B)
    state |= segment("LDTR", 0, 0, 0, UNUSABLE)
    return state | {
        F.GUEST_CR0: 0x8005_0033,
        F.GUEST_CR4: 0x37_26F0,
        F.GUEST_FS_BASE: 0x7F12_3456_7740,
        F.GUEST_RIP: 0x7F12_3450_0000,
        F.GUEST_RFLAGS: 0x246,
        F.GUEST_GDTR_BASE: 0xFFFF_FE00_0000_1000,
        F.GUEST_GDTR_LIMIT: 0x7F,
        F.GUEST_SYSENTER_EIP: 0xFFFF_FFFF_8180_1690,
    }


def test_a_processor_can_start_at_its_reset_vector():
    assert broken(after_reset()) == set()


def test_a_linux_process_can_run():
    assert broken(linux_process()) == set()


def test_the_reset_state_needs_an_unrestricted_guest():
    state = after_reset()
    state[F.SECONDARY_CONTROLS] &= ~SecondaryControls.unrestricted_guest
    assert "vmx.guest.cr0.must-be-one" in broken(state)


def test_an_interrupt_for_a_guest_with_interrupts_off_is_found():
    """The shape of many bug reports: intr_info=800000d1 and RFLAGS=2."""
    state = linux_process() | {F.ENTRY_INTERRUPTION_INFORMATION: 0x8000_00D1, F.GUEST_RFLAGS: 2}
    assert broken(state) == {"vmx.guest.rflags.if"}


def test_a_descriptor_copied_without_moving_its_limit_bits_is_found():
    """The high doubleword of a descriptor shifted right by 8 has limit bits in 11:8."""
    state = linux_process() | {F.GUEST_CS_ACCESS_RIGHTS: 0xAFFB}
    assert broken(state) == {"vmx.guest.cs.reserved-low"}


def test_half_a_link_pointer_is_found():
    """All ones written with a 32-bit VMWRITE of the low half only."""
    assert broken(linux_process() | {F.VMCS_LINK_POINTER: 0xFFFF_FFFF}) == {
        "vmx.guest.link.aligned",
    }


def test_a_task_register_that_was_never_loaded_is_found():
    state = linux_process() | {F.HOST_TR_SELECTOR: 0} | segment("TR", 0, 0, 0, UNUSABLE)
    assert broken(state) == {
        "vmx.host.tr.null",
        "vmx.guest.tr.type",
        "vmx.guest.tr.present",
        "vmx.guest.tr.usable",
    }


def test_a_64_bit_guest_entered_without_its_control_is_found():
    state = linux_process()
    state[F.ENTRY_CONTROLS] &= ~EntryControls.ia32e_mode_guest
    assert "vmx.guest.rip.high" in broken(state)


def test_a_vmcs_of_zeros_breaks_controls_host_and_guest():
    state = dict.fromkeys(valid_state(), 0)
    found = broken(state)
    assert {"vmx.controls.pin.must-be-one", "vmx.host.cr0.must-be-one"} <= found
    assert {"vmx.guest.cr0.must-be-one", "vmx.guest.rflags.bit-1"} <= found
