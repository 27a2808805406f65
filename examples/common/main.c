/*
 * The story.  The first processor finds the others and starts them.  Each processor virtualizes
 * itself while it runs: it goes on as its own L2 guest, uses what its L1 offers, gets an
 * interprocessor interrupt from the first one, and leaves again.  The first one prints it all, in
 * an order that does not depend on time.
 */
#include "apic.h"
#include "console.h"
#include "cpu.h"
#include "hypervisor.h"
#include "interrupts.h"
#include "machine.h"
#include "options.h"
#include "smp.h"
#include "workload.h"

#define MULTIBOOT_LOADED 0x2badb002U

/* Multiboot specification, "Boot information format": the first members. */
struct multiboot {
    u32 flags, memory_lower, memory_upper, boot_device, command_line;
};
enum { MULTIBOOT_HAS_MEMORY = 1, MULTIBOOT_HAS_COMMAND_LINE = 4 };

enum { MOST_COMMAND_LINE = 256 };

struct machine machine;

static void read_multiboot(u32 magic, const struct multiboot *information)
{
    static char command_line[MOST_COMMAND_LINE];

    if (magic != MULTIBOOT_LOADED || !(information->flags & MULTIBOOT_HAS_MEMORY))
        panic(FAILED_SUPPORT, "not started by a Multiboot loader that tells the memory's size");
    machine.memory_top = MIB(1) + KIB(information->memory_upper);
    if (machine.memory_top > HOLE_BASE)
        machine.memory_top = HOLE_BASE; /* the rest is not used */
    if (information->flags & MULTIBOOT_HAS_COMMAND_LINE) {
        const char *from = pointer(information->command_line);
        for (int i = 0; i < MOST_COMMAND_LINE - 1 && from[i]; i++)
            command_line[i] = from[i];
    }
    machine.options = parse_options(command_line);
}

static const char *page_size_name(u64 size)
{
    return size == KIB(4) ? "4 KiB" : size == MIB(2) ? "2 MiB" : "1 GiB";
}

/* The first processor keeps the time; the others wait as long as it does. */
static bool wait_here(const volatile u32 *value, u32 least, unsigned milliseconds)
{
    if (this_cpu()->index == 0)
        return wait_for(value, least, milliseconds);
    while (*value < least)
        pause();
    return true;
}

static void wait_for_stage(u32 index, enum stage stage)
{
    if (!wait_here(&machine.cpus[index].stage, stage, PATIENCE))
        panic(FAILED_STARTUP, "cpu %u stopped at stage %u, before stage %u", index,
              machine.cpus[index].stage, stage);
}

/* Everything that happens in L2, on every processor. */
static void live_as_guest(struct cpu *cpu)
{
    cpu->stage = VIRTUALIZED;
    for (u32 i = 0; i < machine.cpu_count; i++)
        wait_for_stage(i, VIRTUALIZED); /* from here on all run as L2 at the same time */
    run_workload(cpu);
    cpu->stage = WORKED;
}

static void wait_for_ping(struct cpu *cpu)
{
    interrupts_on();
    if (!wait_here(&cpu->pings, 1, PATIENCE))
        panic(FAILED_CHECK, "cpu %u: no interprocessor interrupt came", cpu->index);
    interrupts_off();
    cpu->stage = PINGED;
}

/* The first processor sends an INIT to each of the others, which must not reach L2. */
static void expect_init(struct cpu *cpu)
{
    if (machine.options.catch_init)
        wait_here(&cpu->inits, 1, INIT_PATIENCE);
}

static void send_init(struct cpu *cpu)
{
    if (!machine.options.catch_init)
        return;
    apic_send(cpu->apic_id, COMMAND_INIT | COMMAND_ASSERT);
    if (!wait_here(&cpu->inits, 1, INIT_PATIENCE))
        panic(FAILED_CHECK, "cpu %u: its INIT did not become an exit to L1", cpu->index);
}

static void leave_guest(struct cpu *cpu)
{
    hypercall(HYPERCALL_LEAVE, 0);
    if (cpuid(CPUID_HYPERVISOR, 0).ebx == *(const u32 *)hypervisor_signature)
        panic(FAILED_CHECK, "cpu %u: still virtualized after it left", cpu->index);
    cpu->stage = BACK;
}

static void run_other_cpu(struct cpu *cpu)
{
    bool is_guest = cpu->level == 2; /* L2 was started by L2 */

    start_this_cpu(cpu);
    if (!is_guest) {
        wait_for_stage(0, READY); /* until all have been started */
        virtualize_this_cpu(cpu);
    }
    live_as_guest(cpu);
    wait_for_ping(cpu);
    expect_init(cpu);
    leave_guest(cpu);
    for (;;)
        halt();
}

static void report_cpu(const struct cpu *cpu)
{
    if (cpu->failure) {
        print("cpu %u: L2 FAILED, %s\n", cpu->index, cpu->failure);
        return;
    }
    if (cpu->startup_vector)
        print("cpu %u: started by L2; L1 caught the INIT and the startup IPI for vector 0x%02x\n",
              cpu->index, cpu->startup_vector);
    if (cpu->inits)
        print("cpu %u: L1 caught an INIT that was sent to L2\n", cpu->index);
    print("cpu %u: L2 ok; exits: cpuid %u, msr %u, hypercall %u, port %u, page %u, halt %u, "
          "instruction %u; faults %u, interrupts %u, crc %08x\n",
          cpu->index, cpu->exits[EXIT_OF_CPUID], cpu->exits[EXIT_OF_MSR],
          cpu->exits[EXIT_OF_HYPERCALL], cpu->exits[EXIT_OF_PORT], cpu->exits[EXIT_OF_PAGE],
          cpu->exits[EXIT_OF_HALT], cpu->exits[EXIT_OF_INSTRUCTION], cpu->faults, cpu->pings,
          cpu->checksum);
}

static void NORETURN report_summary(void)
{
    u32 passed = 0, exits = 0;

    for (u32 i = 0; i < machine.cpu_count; i++) {
        passed += !machine.cpus[i].failure;
        for (int kind = 0; kind < EXIT_KINDS; kind++)
            exits += machine.cpus[i].exits[kind];
    }
    bool counted = shared_count == machine.cpu_count * COUNTS_PER_CPU;
    print("%u of %u processors ran as L2 and came back: %u exits, %u counted together%s\n",
          passed, machine.cpu_count, exits, shared_count, counted ? "" : ", WRONG");
    bool all = passed == machine.cpu_count && counted;
    print("%s\n", all ? "passed" : "FAILED");
    finish(all ? PASSED : FAILED_CHECK);
}

void NORETURN main(u32 magic, const struct multiboot *information);

void NORETURN main(u32 magic, const struct multiboot *information)
{
    struct cpu *first = &machine.cpus[0];

    console_start();
    read_multiboot(magic, information);
    memory_start(machine.memory_top);
    mask_legacy_interrupts();
    build_interrupt_table(machine.guest_interrupt_table);
    build_interrupt_table(machine.host_interrupt_table);
    find_cpus();
    start_this_cpu(first);
    print("%s example hypervisor: processors %u, %s pages %s\n", vendor_name, machine.cpu_count,
          nested_paging_name, page_size_name(machine.options.page_size));

    check_support();
    build_nested_tables();
    build_intercept_maps();
    if (!machine.options.trap_apic)
        start_other_cpus(run_other_cpu);
    first->stage = READY;

    virtualize_this_cpu(first);
    if (machine.options.trap_apic)
        start_other_cpus(run_other_cpu);
    live_as_guest(first);
    for (u32 i = 0; i < machine.cpu_count; i++) {
        wait_for_stage(i, WORKED);
        apic_send(machine.cpus[i].apic_id, COMMAND_FIXED | COMMAND_ASSERT | VECTOR_PING);
        if (i == 0)
            wait_for_ping(first);
        wait_for_stage(i, PINGED);
        if (i != 0)
            send_init(&machine.cpus[i]);
    }
    for (u32 i = 0; i < machine.cpu_count; i++)
        report_cpu(&machine.cpus[i]); /* still as L2: the serial port is passed through */
    leave_guest(first);
    for (u32 i = 0; i < machine.cpu_count; i++)
        wait_for_stage(i, BACK);
    report_summary();
}
