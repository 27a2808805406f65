/* What L1 does for L2, whatever the vendor. */
#include "console.h"
#include "cpu.h"
#include "hypervisor.h"
#include "machine.h"

static void set_low(u64 *reg, u64 value, unsigned size)
{
    /* A 32-bit result clears the upper half; a smaller one leaves the rest. */
    u64 mask = size == 4 ? ~0ULL : BIT(8 * size) - 1;
    *reg = (*reg & ~mask) | (value & (BIT(8 * size) - 1));
}

void emulate_cpuid(struct cpu *cpu)
{
    struct registers *r = &cpu->registers;
    u32 leaf = (u32)r->rax;
    struct cpuid result = cpuid(leaf, (u32)r->rcx);

    cpu->exits[EXIT_OF_CPUID]++;
    if (leaf == 1)
        result.ecx = (result.ecx & ~(u32)CPUID_VMX) | CPUID_HYPERVISOR_PRESENT;
    if (leaf == CPUID_EXTENDED)
        result.ecx &= ~(u32)CPUID_SVM;
    if (leaf == CPUID_HYPERVISOR) {
        const u32 *words = (const void *)hypervisor_signature;
        result = (struct cpuid){CPUID_HYPERVISOR, words[0], words[1], words[2]};
    }
    r->rax = result.eax;
    r->rbx = result.ebx;
    r->rcx = result.ecx;
    r->rdx = result.edx;
}

enum verdict emulate_rdmsr(struct cpu *cpu)
{
    struct registers *r = &cpu->registers;
    cpu->exits[EXIT_OF_MSR]++;
    if ((u32)r->rcx != MSR_SYSENTER_EIP)
        return INJECT_GP;
    r->rax = (u32)cpu->shadow_sysenter_eip;
    r->rdx = cpu->shadow_sysenter_eip >> 32;
    return RESUME;
}

enum verdict emulate_wrmsr(struct cpu *cpu)
{
    struct registers *r = &cpu->registers;
    cpu->exits[EXIT_OF_MSR]++;
    if ((u32)r->rcx != MSR_SYSENTER_EIP)
        return INJECT_GP;
    cpu->shadow_sysenter_eip = r->rdx << 32 | (u32)r->rax;
    return RESUME;
}

void emulate_port(struct cpu *cpu, u16 port, unsigned size, bool is_input)
{
    unsigned shift = 8 * (port - EMULATED_PORT);
    u32 mask = (u32)(BIT(8 * size) - 1);

    cpu->exits[EXIT_OF_PORT]++;
    if (port < EMULATED_PORT || port + size > EMULATED_PORT + EMULATED_PORT_COUNT)
        panic(FAILED_EXIT, "cpu %u: exit for port 0x%x, which is not intercepted", cpu->index,
              port);
    if (is_input)
        set_low(&cpu->registers.rax, ~cpu->port_value >> shift, size);
    else
        cpu->port_value = (cpu->port_value & ~(mask << shift)) |
                          ((u32)cpu->registers.rax & mask) << shift;
}

void emulate_hole(struct cpu *cpu, u64 guest_physical, bool is_write)
{
    u64 window = HOLE_BASE + cpu->index * HOLE_SIZE;
    if (guest_physical < window || guest_physical >= window + HOLE_SIZE)
        panic(FAILED_EXIT, "cpu %u: L2 %s guest-physical 0x%lx, which is not mapped", cpu->index,
              is_write ? "wrote" : "read", guest_physical);

    u64 *page = allocate_page();
    for (unsigned i = 0; i < PAGE_SIZE / sizeof *page; i++)
        page[i] = HOLE_PATTERN + i;
    map_nested_page(guest_physical & ~(PAGE_SIZE - 1), physical(page));
    cpu->exits[EXIT_OF_PAGE]++;
    cpu->page_reads += !is_write;
    cpu->page_writes += is_write;
}

enum verdict emulate_hypercall(struct cpu *cpu)
{
    struct registers *r = &cpu->registers;
    if (r->rax == HYPERCALL_LEAVE) { /* the last exit is not counted: the report comes before it */
        r->rax = 0;
        return LEAVE;
    }
    cpu->exits[EXIT_OF_HYPERCALL]++;
    switch (r->rax) {
    case HYPERCALL_WHO_AM_I:
        r->rax = cpu->index;
        return RESUME;
    case HYPERCALL_READ_STATE:
        r->rax = read_guest_sysenter_esp(cpu);
        return RESUME;
    case HYPERCALL_UNMAP:
        unmap_nested_page(cpu, r->rdi);
        r->rax = 0;
        return RESUME;
    default:
        return INJECT_UD;
    }
}
