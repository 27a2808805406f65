/* Virtualizing a processor while it runs: AMD APM volume 2, "Secure Virtual Machine". */
#include "hypervisor.h"

#include "control.h"
#include "cpu.h"
#include "interrupts.h"
#include "machine.h"

const char vendor_name[] = "AMD SVM";
const char nested_paging_name[] = "NPT";
const char catch_init_option[] = "init=sx";
const char hypervisor_signature[13] = "ExampleOnSVM";

_Static_assert(offsetof(struct cpu, host_stack_top) == 8, "as in world.S");
_Static_assert(offsetof(struct cpu, control) == 16, "as in world.S");
_Static_assert(offsetof(struct cpu, host_state) == 24, "as in world.S");
_Static_assert(offsetof(struct cpu, registers) == 32, "as in world.S");
_Static_assert(offsetof(struct cpu, return_frame) == 32 + sizeof(struct registers), "world.S");

void world_switch(struct cpu *cpu);
void NORETURN world_start(struct cpu *cpu);
void enter_host(struct cpu *cpu, u64 rip, u64 rsp);
void leave_host(struct cpu *cpu);

/* "VMLOAD and VMSAVE Instructions", "Global Interrupt Flag, STGI and CLGI Instructions". */
static void vmload(void *vmcb) { asm volatile("vmload %0" : : "a"(vmcb) : "memory"); }
static void clgi(void) { asm volatile("clgi" : : : "memory"); }
static void stgi(void) { asm volatile("stgi" : : : "memory"); }

static void enable(struct cpu *cpu)
{
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_SVME);
    wrmsr(MSR_VM_HSAVE_PA, physical(cpu->host_save));
    if (machine.options.catch_init) /* "INIT Intercept": the way without a pending INIT */
        wrmsr(MSR_VM_CR, rdmsr(MSR_VM_CR) | VM_CR_R_INIT);
}

static void disable(void)
{
    if (machine.options.catch_init)
        wrmsr(MSR_VM_CR, rdmsr(MSR_VM_CR) & ~(u64)VM_CR_R_INIT);
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) & ~(u64)EFER_SVME);
    wrmsr(MSR_VM_HSAVE_PA, 0);
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
    cpu->host_save = allocate_page();
    cpu->shadow_sysenter_eip = rdmsr(MSR_SYSENTER_EIP);
}

void virtualize_this_cpu(struct cpu *cpu)
{
    allocate(cpu);
    interrupts_off();
    enable(cpu);
    world_switch(cpu);
}

/* On L1's stack, before the first VMRUN. */
void enter_host(struct cpu *cpu, u64 rip, u64 rsp)
{
    clgi(); /* from here on nothing interrupts L1 */
    set_controls(cpu->control);
    capture_state(cpu->control, rip, rsp);
    become_host(cpu);
    vmsave(cpu->host_state);
    cpu->level = 2;
}

void run_from_startup(struct cpu *cpu)
{
    become_host(cpu);
    allocate(cpu);
    enable(cpu);
    clgi();
    set_controls(cpu->control);
    set_startup_state(cpu);
    vmsave(cpu->host_state);
    cpu->level = 2;
    cpu->stage = IN_HOST;
    world_start(cpu);
}

/* After the last exit: L2's state becomes the processor's own. */
void leave_host(struct cpu *cpu)
{
    struct vmcb *vmcb = cpu->control;

    load_descriptors(&cpu->guest_descriptors, machine.guest_interrupt_table);
    vmload(vmcb);
    wrmsr(MSR_SYSENTER_EIP, cpu->shadow_sysenter_eip);
    cpu->return_frame = (struct return_frame){
        vmcb->rip, vmcb->cs.selector, vmcb->rflags, vmcb->rsp, vmcb->ss.selector,
    };
    stgi();
    disable();
    cpu->level = 1;
}

u64 read_guest_sysenter_esp(struct cpu *cpu)
{
    const struct vmcb *vmcb = cpu->control;
    return vmcb->sysenter_esp;
}

u64 hypercall(enum hypercall number, u64 argument)
{
    u64 result;
    asm volatile("vmmcall" : "=a"(result) : "a"((u64)number), "D"(argument) : "memory");
    return result;
}

const char *check_virtualization_is_hidden(void)
{
    return rdmsr(MSR_EFER) & EFER_SVME ? "hiding: L2 sees EFER.SVME" : NULL;
}

u64 try_virtualization_instruction(void)
{
    fault_t fault = 0;
    asm volatile("1: clgi\n" FIXUP : "+a"(fault));
    return fault;
}
