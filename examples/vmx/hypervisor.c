/* Virtualizing a processor while it runs: Intel SDM volume 3, "Introduction to VMX" and following. */
#include "hypervisor.h"

#include "control.h"
#include "cpu.h"
#include "console.h"
#include "interrupts.h"
#include "machine.h"

/* Appendix "VMX Capability Reporting Facility". */
enum vmx_msr {
    MSR_FEATURE_CONTROL = 0x3a,
    MSR_VMX_BASIC = 0x480,
    MSR_VMX_PIN = 0x481,
    MSR_VMX_PROCESSOR = 0x482,
    MSR_VMX_EXIT = 0x483,
    MSR_VMX_ENTRY = 0x484,
    MSR_VMX_CR0_FIXED0 = 0x486,
    MSR_VMX_CR0_FIXED1 = 0x487,
    MSR_VMX_CR4_FIXED0 = 0x488,
    MSR_VMX_CR4_FIXED1 = 0x489,
    MSR_VMX_SECONDARY = 0x48b,
    MSR_VMX_EPT_VPID = 0x48c,
    MSR_VMX_TRUE_PIN = 0x48d,
    MSR_VMX_TRUE_PROCESSOR = 0x48e,
    MSR_VMX_TRUE_EXIT = 0x48f,
    MSR_VMX_TRUE_ENTRY = 0x490,
};
enum { FEATURE_CONTROL_LOCKED = 1 << 0, FEATURE_CONTROL_VMX = 1 << 2 };
#define BASIC_REVISION 0x7fffffffU
#define BASIC_TRUE_CONTROLS BIT(55)
#define EPT_FOUR_LEVELS BIT(6)
#define EPT_WRITE_BACK BIT(14)
#define EPT_2M BIT(16)
#define EPT_1G BIT(17)
#define EPT_INVEPT BIT(20)
#define EPT_INVEPT_SINGLE BIT(25)
#define EPT_INVVPID BIT(32)
#define EPT_INVVPID_SINGLE BIT(41)

/* The L2 of every processor has the same number: the processors have translations of their own. */
enum { L2_VPID = 1 };

const char vendor_name[] = "Intel VMX";
const char nested_paging_name[] = "EPT";
const char hypervisor_signature[13] = "ExampleOnVMX";

_Static_assert(offsetof(struct cpu, host_stack_top) == 8, "as in world.S");
_Static_assert(offsetof(struct cpu, registers) == 32, "as in world.S");
_Static_assert(offsetof(struct cpu, return_frame) == 32 + sizeof(struct registers), "world.S");
_Static_assert(offsetof(struct cpu, launched) == 192, "as in world.S");

static u8 io_bitmaps[2][PAGE_SIZE] ALIGNED(4096);
static u8 msr_bitmap[PAGE_SIZE] ALIGNED(4096);

extern const u8 world_exit[];
void world_switch(struct cpu *cpu);
void enter_host(struct cpu *cpu, u64 rip, u64 rsp);
void leave_host(struct cpu *cpu);
void report_failed_entry(struct cpu *cpu, u64 rflags);

/* "Conventions": an instruction that fails sets CF or ZF. */
#define VMX_FAILED "=@ccbe"

u64 vmread(enum field field)
{
    u64 value;
    bool failed;
    asm volatile("vmread %2, %1" : VMX_FAILED(failed), "=r"(value) : "r"((u64)field));
    if (failed)
        panic(FAILED_ENTRY, "VMREAD of field 0x%x failed", field);
    return value;
}

void vmwrite(enum field field, u64 value)
{
    bool failed;
    asm volatile("vmwrite %1, %2" : VMX_FAILED(failed) : "r"(value), "r"((u64)field) : "memory");
    if (failed)
        panic(FAILED_ENTRY, "VMWRITE of 0x%lx to field 0x%x failed", value, field);
}

static void check_ept(void)
{
    u64 capability = rdmsr(MSR_VMX_EPT_VPID);
    u64 size = machine.options.page_size;
    u64 needed = EPT_FOUR_LEVELS | EPT_WRITE_BACK | EPT_INVEPT |
                 (size == MIB(2) ? EPT_2M : size == GIB(1) ? EPT_1G : 0);

    if ((capability & needed) != needed)
        panic(FAILED_SUPPORT, "EPT of this processor lacks bits 0x%lx of IA32_VMX_EPT_VPID_CAP",
              needed & ~capability);
    machine.features.invept_single = capability & EPT_INVEPT_SINGLE;
    machine.features.vpid = (capability & EPT_INVVPID) && (capability & EPT_INVVPID_SINGLE) &&
                            (rdmsr(MSR_VMX_SECONDARY) >> 32 & ENABLE_VPID);
    if (machine.options.verbose)
        print("VMX basic 0x%lx, EPT and VPID 0x%lx\n", rdmsr(MSR_VMX_BASIC), capability);
}

void check_support(void)
{
    if (!(cpuid(1, 0).ecx & BIT(5)))
        panic(FAILED_SUPPORT, "this processor has no VMX");
    u64 control = rdmsr(MSR_FEATURE_CONTROL);
    if ((control & FEATURE_CONTROL_LOCKED) && !(control & FEATURE_CONTROL_VMX))
        panic(FAILED_SUPPORT, "the firmware has disabled VMX (IA32_FEATURE_CONTROL)");
    if (!(rdmsr(MSR_VMX_PROCESSOR) >> 32 & USE_SECONDARY) ||
        !(rdmsr(MSR_VMX_SECONDARY) >> 32 & ENABLE_EPT))
        panic(FAILED_SUPPORT, "this processor has no EPT");
    check_ept();
}

static void intercept_port(u16 port)
{
    io_bitmaps[port >> 15][(port & 0x7fff) / 8] |= (u8)(1 << port % 8);
}

/* "MSR-Bitmap Address": reads of low and high registers, then writes, 1 KiB each. */
static void intercept_msr(u32 msr)
{
    u32 half = msr >= 0xc0000000 ? 0x400 : 0;
    u32 bit = msr & 0x1fff;
    msr_bitmap[half + bit / 8] |= (u8)(1 << bit % 8);
    msr_bitmap[0x800 + half + bit / 8] |= (u8)(1 << bit % 8);
}

/* Appendix "Reserved Controls and Default Settings": the low half must be 1, the high half may. */
static u32 adjust(u32 msr, u32 needed, u32 wanted)
{
    u64 capability = rdmsr(msr);
    u32 must = (u32)capability, may = (u32)(capability >> 32);
    if (needed & ~may)
        panic(FAILED_SUPPORT, "controls 0x%x are not allowed by the capability register 0x%x",
              needed & ~may, msr);
    return ((needed | wanted) & may) | must;
}

static void set_controls(void)
{
    bool has_true = rdmsr(MSR_VMX_BASIC) & BASIC_TRUE_CONTROLS;

    for (u16 i = 0; i < EMULATED_PORT_COUNT; i++)
        intercept_port(EMULATED_PORT + i);
    intercept_msr(MSR_SYSENTER_EIP);

    vmwrite(PIN_CONTROLS, adjust(has_true ? MSR_VMX_TRUE_PIN : MSR_VMX_PIN, 0, 0));
    vmwrite(PROCESSOR_CONTROLS,
            adjust(has_true ? MSR_VMX_TRUE_PROCESSOR : MSR_VMX_PROCESSOR,
                   HLT_EXITING | USE_IO_BITMAPS | USE_MSR_BITMAPS | USE_SECONDARY, 0));
    vmwrite(SECONDARY_CONTROLS,
            adjust(MSR_VMX_SECONDARY, ENABLE_EPT,
                   ENABLE_RDTSCP | ENABLE_INVPCID | ENABLE_XSAVES | UNRESTRICTED_GUEST |
                       (machine.features.vpid ? ENABLE_VPID : 0)));
    vmwrite(EXIT_CONTROLS, adjust(has_true ? MSR_VMX_TRUE_EXIT : MSR_VMX_EXIT, EXIT_TO_64_BIT,
                                  EXIT_SAVES_EFER | EXIT_LOADS_EFER));
    vmwrite(ENTRY_CONTROLS, adjust(has_true ? MSR_VMX_TRUE_ENTRY : MSR_VMX_ENTRY, ENTRY_TO_64_BIT,
                                   ENTRY_LOADS_EFER));
    vmwrite(IO_BITMAP_A, physical(io_bitmaps[0]));
    vmwrite(IO_BITMAP_B, physical(io_bitmaps[1]));
    vmwrite(MSR_BITMAP, physical(msr_bitmap));
    vmwrite(EXCEPTION_BITMAP, 0);
    vmwrite(CR3_TARGET_COUNT, 0);
    vmwrite(EXIT_MSR_STORE_COUNT, 0);
    vmwrite(EXIT_MSR_LOAD_COUNT, 0);
    vmwrite(ENTRY_MSR_LOAD_COUNT, 0);
    vmwrite(ENTRY_INTERRUPTION, 0);
    vmwrite(VMCS_LINK_POINTER, ~0ULL); /* none */
    vmwrite(EPT_POINTER, machine.nested_root);
    if (vmread(SECONDARY_CONTROLS) & ENABLE_VPID)
        vmwrite(VPID, L2_VPID);
}

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
static void capture_state(u64 rip, u64 rsp)
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

/* What the processor becomes at every exit. */
static void set_host_state(struct cpu *cpu)
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

static u64 fix_bits(u64 value, u32 fixed0, u32 fixed1)
{
    return (value | rdmsr(fixed0)) & rdmsr(fixed1);
}

/* VMXON, VMCLEAR and VMPTRLD take the place of a physical address. */
#define VMX_REGION(instruction, region)                                         \
    do {                                                                        \
        u64 address = physical(region);                                         \
        bool failed;                                                            \
        asm volatile(instruction " %1" : VMX_FAILED(failed) : "m"(address) : "memory"); \
        if (failed)                                                             \
            panic(FAILED_ENTRY, "cpu %u: " instruction " failed", this_cpu()->index); \
    } while (0)

static void enable(struct cpu *cpu)
{
    u32 revision = (u32)rdmsr(MSR_VMX_BASIC) & BASIC_REVISION;

    u64 control = rdmsr(MSR_FEATURE_CONTROL);
    if (!(control & FEATURE_CONTROL_LOCKED))
        wrmsr(MSR_FEATURE_CONTROL, control | FEATURE_CONTROL_LOCKED | FEATURE_CONTROL_VMX);
    write_cr0(fix_bits(read_cr0(), MSR_VMX_CR0_FIXED0, MSR_VMX_CR0_FIXED1));
    write_cr4(fix_bits(read_cr4() | CR4_VMXE, MSR_VMX_CR4_FIXED0, MSR_VMX_CR4_FIXED1));
    *(u32 *)cpu->host_state = revision;
    *(u32 *)cpu->control = revision;
    VMX_REGION("vmxon", cpu->host_state);
    VMX_REGION("vmclear", cpu->control);
    VMX_REGION("vmptrld", cpu->control);
}

/* "INVVPID": what the number was used for before. */
static void invalidate_vpid(void)
{
    struct {
        u64 vpid, linear_address;
    } descriptor = {L2_VPID, 0};
    bool failed;
    asm volatile("invvpid %1, %2"
                 : VMX_FAILED(failed)
                 : "m"(descriptor), "r"(1ULL /* single context */)
                 : "memory");
    if (failed)
        panic(FAILED_ENTRY, "INVVPID failed, error %lu", vmread(INSTRUCTION_ERROR));
}

void virtualize_this_cpu(struct cpu *cpu)
{
    cpu->control = allocate_page();
    cpu->host_state = allocate_page();
    interrupts_off();
    enable(cpu);
    world_switch(cpu);
}

/* On L1's stack, before the first VM entry. */
void enter_host(struct cpu *cpu, u64 rip, u64 rsp)
{
    set_controls();
    capture_state(rip, rsp);

    load_descriptors(&cpu->host_descriptors, machine.host_interrupt_table);
    wrmsr(MSR_GS_BASE, physical(cpu));
    set_host_state(cpu);
    invalidate_nested_translations();
    if (machine.features.vpid)
        invalidate_vpid();
    cpu->level = 2;
}

/* "VM-Instruction Error Numbers"; after VMfailInvalid there is no number. */
void report_failed_entry(struct cpu *cpu, u64 rflags)
{
    bool is_valid = rflags & BIT(6); /* ZF */
    panic(FAILED_ENTRY, "cpu %u: %s failed, VM-instruction error %lu", cpu->index,
          cpu->launched ? "VMRESUME" : "VMLAUNCH", is_valid ? vmread(INSTRUCTION_ERROR) : 0);
}

/* After the last exit: L2's state becomes the processor's own. */
void leave_host(struct cpu *cpu)
{
    load_descriptors(&cpu->guest_descriptors, machine.guest_interrupt_table);
    wrmsr(MSR_FS_BASE, vmread(GUEST_FS_BASE));
    wrmsr(MSR_GS_BASE, vmread(GUEST_GS_BASE));
    wrmsr(MSR_SYSENTER_CS, vmread(GUEST_SYSENTER_CS));
    wrmsr(MSR_SYSENTER_ESP, vmread(GUEST_SYSENTER_ESP));
    wrmsr(MSR_SYSENTER_EIP, vmread(GUEST_SYSENTER_EIP));
    cpu->return_frame = (struct return_frame){
        vmread(GUEST_RIP), vmread(GUEST_CS_SELECTOR), vmread(GUEST_RFLAGS),
        vmread(GUEST_RSP), vmread(GUEST_SS_SELECTOR),
    };
    VMX_REGION("vmclear", cpu->control);
    asm volatile("vmxoff" : : : "memory", "cc");
    write_cr4(read_cr4() & ~(u64)CR4_VMXE);
    cpu->level = 1;
}

u64 read_guest_sysenter_esp(struct cpu *cpu)
{
    (void)cpu; /* its VMCS is the current one */
    return vmread(GUEST_SYSENTER_ESP);
}

u64 hypercall(enum hypercall number, u64 argument)
{
    u64 result;
    asm volatile("vmcall" : "=a"(result) : "a"((u64)number), "D"(argument) : "memory");
    return result;
}

const char *check_virtualization_is_hidden(void)
{
    return read_cr4() & CR4_VMXE ? "hiding: L2 sees CR4.VMXE" : NULL;
}

u64 try_virtualization_instruction(void)
{
    fault_t fault = 0;
    asm volatile("1: vmxoff\n" FIXUP : "+a"(fault) : : "cc");
    return fault;
}
