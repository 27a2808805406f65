#include "smp.h"

#include "acpi.h"
#include "apic.h"
#include "cpu.h"
#include "interrupts.h"
#include "machine.h"

/* Pages of conventional memory that neither firmware nor loader needs any more. */
#define HOST_TRAMPOLINE 0x7000U
#define GUEST_TRAMPOLINE 0x8000U

/* As trampoline.S lays it out. */
struct trampoline_parameters {
    u64 page_map, stack, entry, argument;
};

extern const u8 trampoline[], trampoline_end[], trampoline_gdt_base[];
extern const u8 trampoline_protected_mode[], trampoline_long_mode[], trampoline_parameters[];

static u8 guest_stacks[MOST_CPUS][STACK_SIZE] ALIGNED(16);
static u8 host_stacks[MOST_CPUS][STACK_SIZE] ALIGNED(16);

void find_cpus(void)
{
    u32 apic_ids[MOST_CPUS];
    unsigned found = find_processors(apic_ids, MOST_CPUS);
    u32 own = apic_id();

    machine.cpus[0].apic_id = own;
    machine.cpu_count = 1;
    for (unsigned i = 0; i < found && machine.cpu_count < MOST_CPUS; i++)
        if (apic_ids[i] != own)
            machine.cpus[machine.cpu_count++].apic_id = apic_ids[i];
    for (u32 i = 0; i < machine.cpu_count; i++) {
        struct cpu *cpu = &machine.cpus[i];
        cpu->self = cpu;
        cpu->index = i;
        cpu->level = 1;
        cpu->host_stack_top = host_stacks[i] + STACK_SIZE;
        build_descriptors(&cpu->guest_descriptors);
        build_descriptors(&cpu->host_descriptors);
    }
}

void start_this_cpu(struct cpu *cpu)
{
    load_descriptors(&cpu->guest_descriptors, machine.guest_interrupt_table);
    wrmsr(MSR_GS_BASE, physical(cpu));
    apic_enable();
    cpu->stage = STARTED;
}

static void relocate(u32 page, const u8 *field)
{
    *(u32 *)pointer(page + (u64)(field - trampoline)) += page;
}

static void prepare_trampoline(u32 page, struct cpu *cpu, u8 *stack, void (*entry)(struct cpu *))
{
    u8 *to = pointer(page);
    struct trampoline_parameters *parameters = (void *)(to + (trampoline_parameters - trampoline));

    for (const u8 *from = trampoline; from < trampoline_end; from++)
        *to++ = *from;
    relocate(page, trampoline_gdt_base);
    relocate(page, trampoline_protected_mode);
    relocate(page, trampoline_long_mode);
    parameters->page_map = read_cr3();
    parameters->stack = physical(stack + STACK_SIZE);
    parameters->entry = (u64)(uintptr_t)entry;
    parameters->argument = physical(cpu);
}

/* "MP Initialization Protocol": INIT, 10 ms, startup IPI, 200 us, and a second if need be. */
static void start_cpu(struct cpu *cpu, u32 page, enum stage stage)
{
    u32 startup = COMMAND_STARTUP | COMMAND_ASSERT | page / PAGE_SIZE;

    apic_send(cpu->apic_id, COMMAND_INIT | COMMAND_ASSERT);
    delay_microseconds(10000);
    apic_send(cpu->apic_id, startup);
    delay_microseconds(200);
    if (cpu->stage < stage)
        apic_send(cpu->apic_id, startup);
    if (!wait_for(&cpu->stage, stage, PATIENCE))
        panic(FAILED_STARTUP, "cpu %u, local APIC %u, did not start", cpu->index, cpu->apic_id);
}

void start_other_cpus(void (*entry)(struct cpu *))
{
    for (u32 i = 1; i < machine.cpu_count; i++) {
        struct cpu *cpu = &machine.cpus[i];
        prepare_trampoline(GUEST_TRAMPOLINE, cpu, guest_stacks[i], entry);
        start_cpu(cpu, GUEST_TRAMPOLINE, STARTED);
    }
}

void start_cpu_in_host(struct cpu *cpu)
{
    prepare_trampoline(HOST_TRAMPOLINE, cpu, host_stacks[cpu->index], run_from_startup);
    start_cpu(cpu, HOST_TRAMPOLINE, IN_HOST);
}
