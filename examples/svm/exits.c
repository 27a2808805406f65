/* What made L2 stop, and what L1 does about it: a table by exit code. */
#include "apic.h"
#include "control.h"
#include "cpu.h"
#include "hypervisor.h"
#include "interrupts.h"
#include "machine.h"

#define MSR_EXIT_WRITE 1

static void inject(struct vmcb *vmcb, enum vector vector, bool has_error_code)
{
    vmcb->event = EVENT_VALID | EVENT_EXCEPTION | vector |
                  (has_error_code ? EVENT_HAS_ERROR_CODE : 0);
}

/* `length` is the instruction's, for processors that do not tell where the next one begins. */
static void advance(struct vmcb *vmcb, unsigned length)
{
    vmcb->rip = machine.features.next_rip ? vmcb->next_rip : vmcb->rip + length;
    vmcb->interrupt_shadow = 0;
}

static bool conclude(struct vmcb *vmcb, enum verdict verdict, unsigned length)
{
    switch (verdict) {
    case INJECT_GP:
        inject(vmcb, VECTOR_GP, true);
        return true;
    case INJECT_UD:
        inject(vmcb, VECTOR_UD, false);
        return true;
    case RESUME:
    case LEAVE:
        advance(vmcb, length);
        return verdict == RESUME;
    }
    return false;
}

static bool exit_cpuid(struct cpu *cpu, struct vmcb *vmcb)
{
    emulate_cpuid(cpu);
    return conclude(vmcb, RESUME, 2);
}

static bool exit_hlt(struct cpu *cpu, struct vmcb *vmcb)
{
    cpu->exits[EXIT_OF_HALT]++; /* wakes at once */
    return conclude(vmcb, RESUME, 1);
}

static enum verdict emulate_efer(struct cpu *cpu, struct vmcb *vmcb, bool is_write)
{
    struct registers *r = &cpu->registers;
    cpu->exits[EXIT_OF_MSR]++;
    if (is_write) {
        vmcb->efer = (r->rdx << 32 | (u32)r->rax) | EFER_SVME;
    } else {
        r->rax = (u32)vmcb->efer & ~(u32)EFER_SVME;
        r->rdx = vmcb->efer >> 32;
    }
    return RESUME;
}

static bool exit_msr(struct cpu *cpu, struct vmcb *vmcb)
{
    bool is_write = vmcb->exit_info1 == MSR_EXIT_WRITE;
    enum verdict verdict;
    if ((u32)cpu->registers.rcx == MSR_EFER)
        verdict = emulate_efer(cpu, vmcb, is_write);
    else
        verdict = is_write ? emulate_wrmsr(cpu) : emulate_rdmsr(cpu);
    return conclude(vmcb, verdict, 2);
}

static bool exit_ioio(struct cpu *cpu, struct vmcb *vmcb)
{
    u64 information = vmcb->exit_info1;
    if (information & IOIO_STRING)
        panic(FAILED_EXIT, "cpu %u: string I/O is not emulated", cpu->index);
    emulate_port(cpu, (u16)(information >> IOIO_PORT_SHIFT), information >> IOIO_SIZE_SHIFT & 7,
                 information & IOIO_INPUT);
    vmcb->rip = vmcb->exit_info2; /* the next instruction */
    vmcb->interrupt_shadow = 0;
    return true;
}

static bool exit_vmmcall(struct cpu *cpu, struct vmcb *vmcb)
{
    return conclude(vmcb, emulate_hypercall(cpu), 3);
}

static bool exit_npf(struct cpu *cpu, struct vmcb *vmcb)
{
    if ((vmcb->exit_info2 & ~(PAGE_SIZE - 1)) == APIC_PAGE) {
        vmcb->rip += emulate_apic(cpu, vmcb->rip, vmcb->exit_info2);
        vmcb->interrupt_shadow = 0;
        return true;
    }
    if (vmcb->exit_info1 & (NPF_PRESENT | NPF_RESERVED))
        panic(FAILED_EXIT, "cpu %u: nested page fault, error code 0x%lx, guest-physical 0x%lx",
              cpu->index, vmcb->exit_info1, vmcb->exit_info2);
    emulate_hole(cpu, vmcb->exit_info2, vmcb->exit_info1 & NPF_WRITE);
    return true; /* the instruction again */
}

/* VM_CR.R_INIT made a security exception of it, and the exception is intercepted. */
static bool exit_init(struct cpu *cpu, struct vmcb *vmcb)
{
    if (vmcb->exit_info1 != SX_INIT)
        panic(FAILED_EXIT, "cpu %u: #SX with error code 0x%lx", cpu->index, vmcb->exit_info1);
    cpu->inits++;
    return true; /* L2 goes on and never knows */
}

static bool exit_shutdown(struct cpu *cpu, struct vmcb *vmcb)
{
    (void)vmcb; /* "Shutdown": its state save area is undefined */
    panic(FAILED_EXIT, "cpu %u: L2 shut down (triple fault)", cpu->index);
}

static bool exit_forbidden_instruction(struct cpu *cpu, struct vmcb *vmcb)
{
    cpu->exits[EXIT_OF_INSTRUCTION]++;
    return conclude(vmcb, INJECT_UD, 0);
}

static const struct {
    enum exit_code code;
    bool (*handle)(struct cpu *, struct vmcb *);
} exits[] = {
    {EXIT_CPUID, exit_cpuid},
    {EXIT_HLT, exit_hlt},
    {EXIT_IOIO, exit_ioio},
    {EXIT_MSR, exit_msr},
    {EXIT_VMMCALL, exit_vmmcall},
    {EXIT_NPF, exit_npf},
    {EXIT_SHUTDOWN, exit_shutdown},
    {EXIT_EXCEPTION + VECTOR_SX, exit_init},
    {EXIT_INVLPGA, exit_forbidden_instruction},
    {EXIT_VMRUN, exit_forbidden_instruction},
    {EXIT_VMLOAD, exit_forbidden_instruction},
    {EXIT_VMSAVE, exit_forbidden_instruction},
    {EXIT_STGI, exit_forbidden_instruction},
    {EXIT_CLGI, exit_forbidden_instruction},
    {EXIT_SKINIT, exit_forbidden_instruction},
};

static bool dispatch(struct cpu *cpu, struct vmcb *vmcb)
{
    for (unsigned i = 0; i < sizeof exits / sizeof *exits; i++)
        if (exits[i].code == vmcb->exit_code)
            return exits[i].handle(cpu, vmcb);
    if (vmcb->exit_code == EXIT_INVALID)
        panic(FAILED_ENTRY, "cpu %u: VMRUN refused the VMCB (VMEXIT_INVALID)", cpu->index);
    panic(FAILED_EXIT,
          "cpu %u: unexpected exit 0x%lx, information 0x%lx and 0x%lx, L2's rip 0x%lx", cpu->index,
          vmcb->exit_code, vmcb->exit_info1, vmcb->exit_info2, vmcb->rip);
}

bool handle_exit(struct cpu *cpu)
{
    struct vmcb *vmcb = cpu->control;

    cpu->level = 1;
    cpu->registers.rax = vmcb->rax;
    vmcb->tlb_control = TLB_KEEP;
    vmcb->event = vmcb->exit_interrupt_info; /* what was on its way into L2 is delivered again */
    bool goes_on = dispatch(cpu, vmcb);
    vmcb->rax = cpu->registers.rax;
    cpu->level = 2;
    return goes_on;
}
