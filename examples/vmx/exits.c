/* What made L2 stop, and what L1 does about it: a table by exit reason. */
#include "apic.h"
#include "control.h"
#include "cpu.h"
#include "hypervisor.h"
#include "interrupts.h"
#include "machine.h"

static void inject(enum vector vector, bool has_error_code)
{
    vmwrite(ENTRY_INTERRUPTION, EVENT_VALID | EVENT_EXCEPTION | vector |
                                    (has_error_code ? EVENT_HAS_ERROR_CODE : 0));
    if (has_error_code)
        vmwrite(ENTRY_ERROR_CODE, 0);
}

static void advance(void)
{
    vmwrite(GUEST_RIP, vmread(GUEST_RIP) + vmread(INSTRUCTION_LENGTH));
    vmwrite(GUEST_INTERRUPTIBILITY, vmread(GUEST_INTERRUPTIBILITY) & ~(u64)BLOCKING_SHADOW);
}

static bool conclude(enum verdict verdict)
{
    switch (verdict) {
    case INJECT_GP:
        inject(VECTOR_GP, true);
        return true;
    case INJECT_UD:
        inject(VECTOR_UD, false);
        return true;
    case RESUME:
    case LEAVE:
        advance();
        return verdict == RESUME;
    }
    return false;
}

static bool exit_cpuid(struct cpu *cpu)
{
    emulate_cpuid(cpu);
    return conclude(RESUME);
}

static bool exit_hlt(struct cpu *cpu)
{
    cpu->exits[EXIT_OF_HALT]++; /* wakes at once */
    return conclude(RESUME);
}

static bool exit_rdmsr(struct cpu *cpu) { return conclude(emulate_rdmsr(cpu)); }

static bool exit_wrmsr(struct cpu *cpu) { return conclude(emulate_wrmsr(cpu)); }

static bool exit_io(struct cpu *cpu)
{
    u64 information = vmread(EXIT_QUALIFICATION);
    if (information & IO_STRING)
        panic(FAILED_EXIT, "cpu %u: string I/O is not emulated", cpu->index);
    emulate_port(cpu, (u16)(information >> IO_PORT_SHIFT), (information & IO_SIZE) + 1,
                 information & IO_INPUT);
    return conclude(RESUME);
}

static bool exit_vmcall(struct cpu *cpu) { return conclude(emulate_hypercall(cpu)); }

static bool exit_ept_violation(struct cpu *cpu)
{
    u64 qualification = vmread(EXIT_QUALIFICATION);
    u64 guest_physical = vmread(GUEST_PHYSICAL_ADDRESS);

    if ((guest_physical & ~(PAGE_SIZE - 1)) == APIC_PAGE) {
        emulate_apic(cpu, vmread(GUEST_RIP), guest_physical);
        return conclude(RESUME);
    }
    if (qualification & EPT_WAS_MAPPED)
        panic(FAILED_EXIT, "cpu %u: EPT violation, qualification 0x%lx, guest-physical 0x%lx",
              cpu->index, qualification, guest_physical);
    emulate_hole(cpu, guest_physical, qualification & EPT_WRITE);
    return true; /* the instruction again */
}

/* Outside VMX root operation an INIT always exits, and that is all it does. */
static bool exit_init(struct cpu *cpu)
{
    if (!machine.options.catch_init)
        panic(FAILED_EXIT, "cpu %u: an INIT that nobody sent", cpu->index);
    cpu->inits++;
    return true; /* L2 goes on and never knows */
}

static bool exit_triple_fault(struct cpu *cpu)
{
    panic(FAILED_EXIT, "cpu %u: L2 shut down (triple fault) at rip 0x%lx", cpu->index,
          vmread(GUEST_RIP));
}

static bool exit_forbidden_instruction(struct cpu *cpu)
{
    cpu->exits[EXIT_OF_INSTRUCTION]++;
    return conclude(INJECT_UD);
}

static const struct {
    enum exit_code code;
    bool (*handle)(struct cpu *);
} exits[] = {
    {EXIT_CPUID, exit_cpuid},
    {EXIT_HLT, exit_hlt},
    {EXIT_IO, exit_io},
    {EXIT_RDMSR, exit_rdmsr},
    {EXIT_WRMSR, exit_wrmsr},
    {EXIT_VMCALL, exit_vmcall},
    {EXIT_EPT_VIOLATION, exit_ept_violation},
    {EXIT_TRIPLE_FAULT, exit_triple_fault},
    {EXIT_INIT, exit_init},
    {EXIT_VMCLEAR, exit_forbidden_instruction},
    {EXIT_VMLAUNCH, exit_forbidden_instruction},
    {EXIT_VMPTRLD, exit_forbidden_instruction},
    {EXIT_VMPTRST, exit_forbidden_instruction},
    {EXIT_VMREAD, exit_forbidden_instruction},
    {EXIT_VMRESUME, exit_forbidden_instruction},
    {EXIT_VMWRITE, exit_forbidden_instruction},
    {EXIT_VMXOFF, exit_forbidden_instruction},
    {EXIT_VMXON, exit_forbidden_instruction},
    {EXIT_INVEPT, exit_forbidden_instruction},
    {EXIT_INVVPID, exit_forbidden_instruction},
};

static bool dispatch(struct cpu *cpu, u32 reason)
{
    for (unsigned i = 0; i < sizeof exits / sizeof *exits; i++)
        if (exits[i].code == reason)
            return exits[i].handle(cpu);
    if (reason & EXIT_ENTRY_FAILURE)
        panic(FAILED_ENTRY, "cpu %u: VM-entry failure, exit reason 0x%x, qualification 0x%lx",
              cpu->index, reason, vmread(EXIT_QUALIFICATION));
    panic(FAILED_EXIT, "cpu %u: unexpected exit reason %u, qualification 0x%lx, L2's rip 0x%lx",
          cpu->index, reason, vmread(EXIT_QUALIFICATION), vmread(GUEST_RIP));
}

/* An event that was on its way into L2 when the exit came is delivered by the next entry. */
static void deliver_again(void)
{
    u64 event = vmread(IDT_VECTORING);
    if (!(event & EVENT_VALID))
        return;
    vmwrite(ENTRY_INTERRUPTION, event & (EVENT_VALID | EVENT_PARTS));
    vmwrite(ENTRY_INSTRUCTION_LENGTH, vmread(INSTRUCTION_LENGTH));
    if (event & EVENT_HAS_ERROR_CODE)
        vmwrite(ENTRY_ERROR_CODE, vmread(IDT_VECTORING_ERROR_CODE));
}

bool handle_exit(struct cpu *cpu)
{
    cpu->level = 1;
    cpu->launched = true;
    deliver_again();
    bool goes_on = dispatch(cpu, (u32)vmread(EXIT_REASON));
    cpu->level = 2;
    return goes_on;
}
