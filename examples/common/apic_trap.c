/*
 * With `apic=trap` the page of the local APIC is not mapped for L2.  L1 sees each access as an
 * exit, decodes the instruction and does it in L2's place, except for what starts a processor: an
 * INIT goes no further, and after a startup IPI the processor begins in L1, which runs L2 from the
 * vector that L2 asked for.
 */
#include "apic.h"
#include "decode.h"
#include "hypervisor.h"
#include "machine.h"
#include "smp.h"

enum { REGISTERS = 0xff0, SHORTHAND_SELF = 1, SHORTHAND_ALL = 2, SHORTHAND_OTHERS = 3 };

static volatile u32 *real(u64 offset) { return pointer(APIC_PAGE + offset); }

static bool is_addressed(const struct cpu *sender, const struct cpu *cpu, u32 command)
{
    switch (command >> 18 & 3) {
    case SHORTHAND_SELF:
        return cpu == sender;
    case SHORTHAND_ALL:
        return true;
    case SHORTHAND_OTHERS:
        return cpu != sender;
    }
    return *real(APIC_DESTINATION) >> 24 == cpu->apic_id;
}

static void catch_init(struct cpu *cpu)
{
    if (cpu->stage != ABSENT)
        panic(FAILED_EXIT, "cpu %u: an INIT for a processor that runs is not emulated", cpu->index);
    cpu->waits_for_startup = true;
}

static void catch_startup(struct cpu *cpu, u32 vector)
{
    if (!cpu->waits_for_startup)
        return; /* as the processor does */
    cpu->waits_for_startup = false;
    cpu->startup_vector = vector;
    start_cpu_in_host(cpu);
}

static void do_command(struct cpu *sender, u32 command)
{
    u32 mode = command & COMMAND_MODE;

    if (mode != COMMAND_INIT && mode != COMMAND_STARTUP) {
        *real(APIC_COMMAND) = command;
        return;
    }
    if (mode == COMMAND_INIT && !(command & COMMAND_ASSERT))
        return; /* the de-assertion that old processors wanted */
    for (u32 i = 0; i < machine.cpu_count; i++) {
        struct cpu *cpu = &machine.cpus[i];
        if (!is_addressed(sender, cpu, command))
            continue;
        if (mode == COMMAND_INIT)
            catch_init(cpu);
        else
            catch_startup(cpu, command & 0xff);
    }
}

unsigned emulate_apic(struct cpu *cpu, u64 rip, u64 guest_physical)
{
    struct memory_access access;
    u64 offset = guest_physical & REGISTERS;

    /* L2's tables map one to one, as L1's do: RIP is where the bytes are. */
    if (!decode_memory_access(pointer(rip), &cpu->registers, &access))
        panic(FAILED_EXIT, "cpu %u: an access to the local APIC at rip 0x%lx is not decoded",
              cpu->index, rip);
    u32 value = access.has_immediate ? access.immediate : (u32)*access.reg;
    if (!access.is_store)
        *access.reg = *real(offset);
    else if (offset == APIC_COMMAND)
        do_command(cpu, value);
    else
        *real(offset) = value;
    return access.length;
}
