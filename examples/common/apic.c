#include "apic.h"

#include "cpu.h"
#include "hypervisor.h"
#include "interrupts.h"
#include "machine.h"

enum { APIC_BASE_X2APIC = 1 << 10, APIC_BASE_ENABLE = 1 << 11, SPURIOUS_ENABLE = 1 << 8 };
#define CPUID_X2APIC BIT(21)
enum { MSR_X2APIC = 0x800, MSR_X2APIC_COMMAND = 0x830 };

static bool is_x2apic(void) { return rdmsr(MSR_APIC_BASE) & APIC_BASE_X2APIC; }

static volatile u32 *mapped(enum apic_register reg) { return pointer(APIC_PAGE + reg); }

bool apic_is_mapped(void) { return !is_x2apic(); }

static void apic_write(enum apic_register reg, u32 value)
{
    if (is_x2apic())
        wrmsr(MSR_X2APIC + reg / 16, value);
    else
        *mapped(reg) = value;
}

u32 apic_id(void)
{
    return is_x2apic() ? (u32)rdmsr(MSR_X2APIC + APIC_ID / 16) : *mapped(APIC_ID) >> 24;
}

void apic_enable(void)
{
    u64 base = rdmsr(MSR_APIC_BASE);
    if (!(base & APIC_BASE_ENABLE))
        panic(FAILED_SUPPORT, "the local APIC is disabled");
    if (!(base & APIC_BASE_X2APIC) && (base & 0xfffffffff000) != APIC_PAGE)
        panic(FAILED_SUPPORT, "the local APIC is not at 0x%lx", APIC_PAGE);
    if (machine.options.use_x2apic) {
        if (!(cpuid(1, 0).ecx & CPUID_X2APIC))
            panic(FAILED_SUPPORT, "this processor has no x2APIC mode");
        wrmsr(MSR_APIC_BASE, base | APIC_BASE_X2APIC);
    }
    apic_write(APIC_SPURIOUS, SPURIOUS_ENABLE | VECTOR_SPURIOUS);
}

void apic_send(u32 apic_id, u32 command)
{
    if (is_x2apic()) {
        wrmsr(MSR_X2APIC_COMMAND, (u64)apic_id << 32 | command);
        return;
    }
    *mapped(APIC_DESTINATION) = apic_id << 24;
    *mapped(APIC_COMMAND) = command;
    for (int i = 0; i < 100000 && (*mapped(APIC_COMMAND) & COMMAND_PENDING); i++)
        pause();
}

void apic_end_of_interrupt(void) { apic_write(APIC_EOI, 0); }
