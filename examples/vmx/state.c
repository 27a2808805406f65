/* What L2 begins as, and what the processor becomes at every exit. */
#include "control.h"
#include "cpu.h"

enum { NUMBER_OF_CS = 1 };

extern const u8 world_exit[]; /* world.S */

/* `number` counts ES, CS, SS, DS, FS, GS, LDTR, TR. */
static void capture_segment(unsigned number, u16 selector)
{
    struct segment s = read_segment(selector);
    bool is_null = (selector & ~7) == 0;
    vmwrite(GUEST_SELECTORS + 2 * number, s.selector);
    vmwrite(GUEST_LIMITS + 2 * number, s.limit);
    vmwrite(GUEST_ACCESS_RIGHTS + 2 * number, is_null ? SEGMENT_UNUSABLE : s.attributes & 0xf0ff);
    vmwrite(GUEST_BASES + 2 * number, s.base);
}

/* L2 begins as what runs now. */
void capture_state(u64 rip, u64 rsp)
{
    const u16 selectors[] = {read_es(), read_cs(), read_ss(),   read_ds(),
                             read_fs(), read_gs(), read_ldtr(), read_tr()};
    for (unsigned i = 0; i < sizeof selectors / sizeof *selectors; i++)
        capture_segment(i, selectors[i]);
    vmwrite(GUEST_FS_BASE, rdmsr(MSR_FS_BASE));
    vmwrite(GUEST_GS_BASE, rdmsr(MSR_GS_BASE));
    vmwrite(GUEST_GDTR_LIMIT, read_gdtr().limit);
    vmwrite(GUEST_GDTR_BASE, read_gdtr().base);
    vmwrite(GUEST_IDTR_LIMIT, read_idtr().limit);
    vmwrite(GUEST_IDTR_BASE, read_idtr().base);
    vmwrite(GUEST_CR0, read_cr0());
    vmwrite(GUEST_CR3, read_cr3());
    vmwrite(GUEST_CR4, read_cr4());
    vmwrite(CR0_MASK, 0);
    vmwrite(CR0_SHADOW, read_cr0());
    vmwrite(CR4_MASK, CR4_VMXE); /* L2 neither sees nor clears VMXE */
    vmwrite(CR4_SHADOW, read_cr4() & ~(u64)CR4_VMXE);
    vmwrite(GUEST_DR7, read_dr7());
    vmwrite(GUEST_DEBUGCTL, rdmsr(MSR_DEBUGCTL));
    vmwrite(GUEST_SYSENTER_CS, rdmsr(MSR_SYSENTER_CS));
    vmwrite(GUEST_SYSENTER_ESP, rdmsr(MSR_SYSENTER_ESP));
    vmwrite(GUEST_SYSENTER_EIP, rdmsr(MSR_SYSENTER_EIP));
    if (vmread(ENTRY_CONTROLS) & ENTRY_LOADS_EFER)
        vmwrite(GUEST_EFER, rdmsr(MSR_EFER));
    vmwrite(GUEST_INTERRUPTIBILITY, 0);
    vmwrite(GUEST_ACTIVITY, 0);
    vmwrite(GUEST_PENDING_DEBUG, 0);
    vmwrite(GUEST_RFLAGS, 2);
    vmwrite(GUEST_RIP, rip);
    vmwrite(GUEST_RSP, rsp);
}

static void set_segment(unsigned number, u32 access_rights, u16 selector, u64 base)
{
    vmwrite(GUEST_SELECTORS + 2 * number, selector);
    vmwrite(GUEST_LIMITS + 2 * number, 0xffff);
    vmwrite(GUEST_ACCESS_RIGHTS + 2 * number, access_rights);
    vmwrite(GUEST_BASES + 2 * number, base);
}

/* L2 begins as a processor does after INIT and a startup IPI ("Processor State After Reset"). */
void set_startup_state(struct cpu *cpu)
{
    static const u16 access_rights[] = {0x93, 0x9b, 0x93, 0x93, 0x93, 0x93, 0x82, 0x8b};

    for (unsigned i = 0; i < sizeof access_rights / sizeof *access_rights; i++)
        set_segment(i, access_rights[i], 0, 0);
    set_segment(NUMBER_OF_CS, 0x9b, (u16)(cpu->startup_vector << 8), cpu->startup_vector << 12);
    vmwrite(GUEST_GDTR_LIMIT, 0xffff);
    vmwrite(GUEST_GDTR_BASE, 0);
    vmwrite(GUEST_IDTR_LIMIT, 0xffff);
    vmwrite(GUEST_IDTR_BASE, 0);
    vmwrite(GUEST_CR0, CR0_ET | CR0_NE); /* an unrestricted guest may be without PE and PG */
    vmwrite(GUEST_CR3, 0);
    vmwrite(GUEST_CR4, fix_bits(0, MSR_VMX_CR4_FIXED0, MSR_VMX_CR4_FIXED1));
    vmwrite(CR0_MASK, 0);
    vmwrite(CR0_SHADOW, 0);
    vmwrite(CR4_MASK, CR4_VMXE);
    vmwrite(CR4_SHADOW, 0);
    vmwrite(GUEST_DR7, 0x400);
    vmwrite(GUEST_DEBUGCTL, 0);
    vmwrite(GUEST_SYSENTER_CS, 0);
    vmwrite(GUEST_SYSENTER_ESP, 0);
    vmwrite(GUEST_SYSENTER_EIP, 0);
    vmwrite(GUEST_EFER, 0);
    vmwrite(ENTRY_CONTROLS, vmread(ENTRY_CONTROLS) & ~(u64)ENTRY_TO_64_BIT);
    vmwrite(GUEST_INTERRUPTIBILITY, 0);
    vmwrite(GUEST_ACTIVITY, 0);
    vmwrite(GUEST_PENDING_DEBUG, 0);
    vmwrite(GUEST_RFLAGS, 2);
    vmwrite(GUEST_RIP, 0);
    vmwrite(GUEST_RSP, 0);
    cpu->registers.rdx = cpuid(1, 0).eax;
}

/* What the processor becomes at every exit. */
void set_host_state(struct cpu *cpu)
{
    vmwrite(HOST_ES_SELECTOR, SELECTOR_DATA);
    vmwrite(HOST_CS_SELECTOR, SELECTOR_CODE);
    vmwrite(HOST_SS_SELECTOR, SELECTOR_DATA);
    vmwrite(HOST_DS_SELECTOR, SELECTOR_DATA);
    vmwrite(HOST_FS_SELECTOR, 0);
    vmwrite(HOST_GS_SELECTOR, 0);
    vmwrite(HOST_TR_SELECTOR, SELECTOR_TASK);
    vmwrite(HOST_FS_BASE, 0);
    vmwrite(HOST_GS_BASE, physical(cpu));
    vmwrite(HOST_TR_BASE, physical(&cpu->host_descriptors.task));
    vmwrite(HOST_GDTR_BASE, physical(cpu->host_descriptors.gdt));
    vmwrite(HOST_IDTR_BASE, physical(machine.host_interrupt_table));
    vmwrite(HOST_CR0, read_cr0());
    vmwrite(HOST_CR3, read_cr3());
    vmwrite(HOST_CR4, read_cr4());
    vmwrite(HOST_SYSENTER_CS, 0);
    vmwrite(HOST_SYSENTER_ESP, 0);
    vmwrite(HOST_SYSENTER_EIP, 0);
    if (vmread(EXIT_CONTROLS) & EXIT_LOADS_EFER)
        vmwrite(HOST_EFER, rdmsr(MSR_EFER));
    vmwrite(HOST_RIP, physical(world_exit));
    vmwrite(HOST_RSP, physical(cpu->host_stack_top - 16)); /* as world.S has it */
}
