"""One field, many names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undervisor.arch.svm.vmcb import VmcbField as V
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.explain.names import is_high_half, svm_field, vmx_field

STYLES = [
    (
        F.GUEST_CS_ACCESS_RIGHTS,
        "GUEST_CS_AR_BYTES; guest.cs.ar; Guest CS access rights; guestCsAr; "
        "VMX_VMCS32_GUEST_CS_ACCESS_RIGHTS; VMCS_GUEST_CS_ACCESS_RIGHTS; guest_cs_ar_bytes; "
        "0x4816; 4816; GUEST_CS_AR; cs attr",
    ),
    (
        F.PIN_BASED_CONTROLS,
        "PIN_BASED_VM_EXEC_CONTROL; pin_based_vm_exec_control; VMX_PIN_CONTROLS;"
        "Pin-based VM-execution controls; PinBased; VMCS_CTRL_PIN_BASED_VM_EXECUTION_CONTROLS;"
        "VMX_VMCS32_CTRL_PIN_EXEC; VMCS_32BIT_CONTROL_PIN_BASED_EXEC_CONTROLS; 0x4000",
    ),
    (
        F.PRIMARY_CONTROLS,
        "CPU_BASED_VM_EXEC_CONTROL; cpu_based_vm_exec_control; CPUBased; "
        "VMX_PRIMARY_PROCESSOR_CONTROLS; VMX_VMCS32_CTRL_PROC_EXEC; "
        "Primary processor-based controls; VMCS_CTRL_PROCESSOR_BASED_VM_EXECUTION_CONTROLS",
    ),
    (
        F.SECONDARY_CONTROLS,
        "SECONDARY_VM_EXEC_CONTROL; SecondaryExec; VMX_VMCS32_CTRL_PROC_EXEC2; "
        "VMX_SECONDARY_PROCESSOR_CONTROLS",
    ),
    (
        F.ENTRY_CONTROLS,
        "VM_ENTRY_CONTROLS; VMENTRY_CONTROLS; EntryControls; VM-entry controls; "
        "VMCS_CTRL_VMENTRY_CONTROLS",
    ),
    (
        F.EXIT_CONTROLS,
        "VM_EXIT_CONTROLS; Primary VM-exit controls; VMCS_CTRL_PRIMARY_VMEXIT_CONTROLS",
    ),
    (
        F.ENTRY_INTERRUPTION_INFORMATION,
        "VM_ENTRY_INTR_INFO_FIELD; VMX_ENTRY_INTERRUPT_INFO; "
        "VM-entry interruption-information field; VMCS_CTRL_VMENTRY_INTERRUPTION_INFORMATION_FIELD",
    ),
    (
        F.GUEST_INTERRUPTIBILITY_STATE,
        "GUEST_INTERRUPTIBILITY_INFO; GUEST_INTERRUPTIBILITY; "
        "Guest interruptibility state; Interruptibility",
    ),
    (
        F.GUEST_PENDING_DEBUG_EXCEPTIONS,
        "GUEST_PENDING_DBG_EXCEPTIONS; GUEST_PENDING_DBE; "
        "guest_pending_dbg_exceptions; Guest pending debug exceptions",
    ),
    (
        F.VMCS_LINK_POINTER,
        "VMCS_LINK_POINTER; GUEST_VMCS_LINK_PTR; vmcs_link_pointer; "
        "VMCS_GUEST_VMCS_LINK_POINTER; 0x2800",
    ),
    (F.GUEST_EFER, "GUEST_IA32_EFER; guest_ia32_efer; Guest IA32_EFER; guestEfer"),
    (F.HOST_SYSENTER_ESP, "HOST_IA32_SYSENTER_ESP; host_ia32_sysenter_esp; HOST_SYSENTER_ESP"),
    (F.EPT_POINTER, "EPT_POINTER; EPTP; VMX_EPTP; ept_pointer; VMX_VMCS64_CTRL_EPTP_FULL"),
    (F.MSR_BITMAP_ADDRESS, "MSR_BITMAP; msr_bitmap; VMX_MSR_BITMAP"),
    (F.VIRTUAL_APIC_ADDRESS, "VIRTUAL_APIC_PAGE_ADDR; virtual_apic_page_addr; VMX_VAPIC_PAGE"),
    (F.VPID, "VIRTUAL_PROCESSOR_ID; VMX_VPID; vpid; 0x0; 0000"),
    (F.GUEST_PDPTE0, "GUEST_PDPTR0; guest_pdptr0; GUEST_PDPTE0; Guest PDPTE0"),
    (F.EXIT_REASON, "VM_EXIT_REASON; VM_EXIT_INFO_REASON; Exit reason; vm_exit_reason"),
    (F.GUEST_RFLAGS, "GUEST_RFLAGS; guest eflags; rflags; GUEST_EFLAGS"),
    (F.POSTED_INTERRUPT_NOTIFICATION_VECTOR, "POSTED_INTR_NV; posted_intr_nv"),
]
ROWS = [(field, name.strip()) for field, names in STYLES for name in names.split(";")]


@pytest.mark.parametrize(("field", "name"), ROWS)
def test_a_field_is_known_in_every_style(field, name):
    assert vmx_field(name) == field


@pytest.mark.parametrize("field", F)
def test_our_own_names_and_the_encodings_are_known(field):
    assert vmx_field(field.name) == field
    assert vmx_field(field.name.lower().replace("_", " ")) == field
    assert vmx_field(f"{int(field):#06x}") == field


@pytest.mark.parametrize("field", V)
def test_names_of_vmcb_fields_are_known(field):
    assert svm_field(field.name) == field or field.name.startswith("IBS_")


@pytest.mark.parametrize(
    ("field", "name"),
    [
        (V.GUEST_ASID, "asid"),
        (V.NESTED_CONTROL, "control.nested_ctl"),
        (V.N_CR3, "nested_cr3"),
        (V.V_INTR_CONTROL, "int_ctl"),
        (V.INTERRUPT_SHADOW, "int_state"),
        (V.CS_ATTRIBUTES, "save.cs.attrib"),
        (V.EVENTINJ, "event_inj"),
        (V.G_PAT, "g_pat"),
        (V.EFER, "save->efer"),
        (V.IOPM_BASE_PA, "iopm_base_pa"),
        (V.LBR_CONTROL, "virt_ext"),
        (V.EXITCODE, "exit_code"),
    ],
)
def test_linux_names_of_vmcb_fields_are_known(field, name):
    assert svm_field(name) == field


@given(st.text(max_size=300))
def test_any_text_is_a_name_or_none(name):
    for find in (vmx_field, svm_field, is_high_half):
        assert find(name) is None or isinstance(find(name), int)


def test_the_high_half_of_a_64_bit_field_is_told_apart():
    assert is_high_half("TSC_OFFSET_HIGH") == F.TSC_OFFSET
    assert is_high_half("0x2011") == F.TSC_OFFSET
    assert is_high_half("GUEST_CR0_HIGH") is None
    assert is_high_half("TSC_OFFSET") is None
