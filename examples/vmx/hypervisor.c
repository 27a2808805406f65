/* Virtualizing a processor while it runs: Intel SDM volume 3, "Introduction to VMX" and on. */
#include "hypervisor.h"

#include "control.h"
#include "cpu.h"
#include "interrupts.h"
#include "machine.h"

const char vendor_name[] = "Intel VMX";
const char nested_paging_name[] = "EPT";
const char catch_init_option[] = "init=exit";
const char hypervisor_signature[13] = "ExampleOnVMX";

_Static_assert(offsetof(struct cpu, host_stack_top) == 8, "as in world.S");
_Static_assert(offsetof(struct cpu, registers) == 32, "as in world.S");
_Static_assert(offsetof(struct cpu, return_frame) == 32 + sizeof(struct registers), "world.S");
_Static_assert(offsetof(struct cpu, launched) == 192, "as in world.S");

void world_switch(struct cpu *cpu);
void NORETURN world_start(struct cpu *cpu);
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
        panic(FAILED_ENTRY, "INVVPID failed, VM-instruction error %lu", vmread(INSTRUCTION_ERROR));
}

static void disable(struct cpu *cpu)
{
    VMX_REGION("vmclear", cpu->control);
    asm volatile("vmxoff" : : : "memory", "cc");
    write_cr4(read_cr4() & ~(u64)CR4_VMXE);
}

static void become_host(struct cpu *cpu)
{
    load_descriptors(&cpu->host_descriptors, machine.host_interrupt_table);
    wrmsr(MSR_GS_BASE, physical(cpu));
}

static void allocate(struct cpu *cpu)
{
    cpu->control = allocate_page();
    cpu->host_state = allocate_page();
    cpu->shadow_sysenter_eip = rdmsr(MSR_SYSENTER_EIP);
}

static void forget_translations(void)
{
    invalidate_nested_translations();
    if (machine.features.vpid)
        invalidate_vpid();
}

void virtualize_this_cpu(struct cpu *cpu)
{
    allocate(cpu);
    interrupts_off();
    enable(cpu);
    world_switch(cpu);
}

/* On L1's stack, before the first VM entry. */
void enter_host(struct cpu *cpu, u64 rip, u64 rsp)
{
    set_controls();
    capture_state(rip, rsp);
    become_host(cpu);
    set_host_state(cpu);
    forget_translations();
    cpu->level = 2;
}

void run_from_startup(struct cpu *cpu)
{
    become_host(cpu);
    allocate(cpu);
    enable(cpu);
    set_controls();
    set_startup_state(cpu);
    set_host_state(cpu);
    forget_translations();
    cpu->level = 2;
    cpu->stage = IN_HOST;
    world_start(cpu);
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
    wrmsr(MSR_SYSENTER_EIP, cpu->shadow_sysenter_eip);
    cpu->return_frame = (struct return_frame){
        vmread(GUEST_RIP), vmread(GUEST_CS_SELECTOR), vmread(GUEST_RFLAGS),
        vmread(GUEST_RSP), vmread(GUEST_SS_SELECTOR),
    };
    disable(cpu);
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
