#include "workload.h"

#include "cpu.h"
#include "interrupts.h"

enum { BUFFER_SIZE = 32768, PRIME_LIMIT = 10000, PRIMES_BELOW_LIMIT = 1229 };

volatile u32 shared_count;

static u8 buffers[MOST_CPUS][BUFFER_SIZE];

static void expect(struct cpu *cpu, bool holds, const char *what)
{
    if (!holds && !cpu->failure)
        cpu->failure = what;
}

static void use_cpuid(struct cpu *cpu)
{
    struct cpuid signature = cpuid(CPUID_HYPERVISOR, 0);
    const u32 *words = (const void *)hypervisor_signature;
    expect(cpu, signature.eax == CPUID_HYPERVISOR, "CPUID: highest hypervisor leaf");
    expect(cpu,
           signature.ebx == words[0] && signature.ecx == words[1] && signature.edx == words[2],
           "CPUID: signature");

    u32 features = cpuid(1, 0).ecx, extended = cpuid(CPUID_EXTENDED, 0).ecx;
    expect(cpu, features & CPUID_HYPERVISOR_PRESENT, "CPUID: hypervisor bit");
    expect(cpu, !(features & CPUID_VMX) && !(extended & CPUID_SVM),
           "hiding: L2 sees in CPUID that the processor virtualizes");
}

static void use_msrs(struct cpu *cpu)
{
    u64 value = 0x10000000 + cpu->index, read = 0; /* AMD keeps 32 bits */

    wrmsr(MSR_SYSENTER_EIP, value); /* intercepted: L1 keeps it */
    expect(cpu, rdmsr(MSR_SYSENTER_EIP) == value, "MSR: an intercepted write is read back");
    expect(cpu, cpu->shadow_sysenter_eip == value, "MSR: L1 saw the write");

    wrmsr(MSR_SYSENTER_ESP, value + 1); /* not intercepted: part of L2's state */
    expect(cpu, rdmsr(MSR_SYSENTER_ESP) == value + 1, "MSR: a direct write is read back");
    expect(cpu, hypercall(HYPERCALL_READ_STATE, 0) == value + 1, "MSR: L1 finds L2's state");

    expect(cpu, try_rdmsr(MSR_UNKNOWN, &read) == FAULT(VECTOR_GP, 0), "MSR: L1 injects #GP(0)");
}

static void use_port(struct cpu *cpu)
{
    outl(EMULATED_PORT, 0x12345678);
    expect(cpu, inl(EMULATED_PORT) == 0xedcba987, "port: 32 bits");
    outb(EMULATED_PORT + 1, 0xff);
    expect(cpu, inw(EMULATED_PORT) == 0x0087, "port: 16 bits");
    expect(cpu, inb(EMULATED_PORT + 3) == 0xed, "port: 8 bits");
}

static void use_hole(struct cpu *cpu)
{
    u64 page = HOLE_BASE + cpu->index * HOLE_SIZE + 3 * PAGE_SIZE;
    volatile u64 *words = pointer(page);

    expect(cpu, words[5] == HOLE_PATTERN + 5, "page: L1's pattern");
    expect(cpu, cpu->page_reads == 1 && cpu->page_writes == 0, "page: a read caused the exit");
    words[5] = 1;
    expect(cpu, words[5] == 1, "page: what was written is read back");
    expect(cpu, cpu->exits[EXIT_OF_PAGE] == 1, "page: a mapped page causes no exit");

    hypercall(HYPERCALL_UNMAP, page);
    words[6] = 2;
    expect(cpu, cpu->page_writes == 1, "page: after L1 took it away a write exits again");
    expect(cpu, words[5] == HOLE_PATTERN + 5 && words[6] == 2, "page: a new one after that");
}

static void use_faults(struct cpu *cpu)
{
    u32 before = cpu->exits[EXIT_OF_INSTRUCTION];

    expect(cpu, try_undefined_instruction() == FAULT(VECTOR_UD, 0), "fault: L2's own #UD");
    expect(cpu, cpu->exits[EXIT_OF_INSTRUCTION] == before, "fault: L2's own #UD does not exit");
    expect(cpu, try_virtualization_instruction() == FAULT(VECTOR_UD, 0), "fault: L1 injects #UD");
    expect(cpu, cpu->exits[EXIT_OF_INSTRUCTION] == before + 1, "fault: the instruction exits");

    const char *visible = check_virtualization_is_hidden();
    expect(cpu, !visible, visible);
}

/* CRC-32 (polynomial 0xedb88320) of bytes from a linear congruential generator. */
static u32 checksum(u8 *buffer, u32 seed)
{
    u32 crc = ~0U;
    for (u32 i = 0; i < BUFFER_SIZE; i++) {
        seed = seed * 1664525 + 1013904223;
        buffer[i] = (u8)(seed >> 24);
    }
    for (u32 i = 0; i < BUFFER_SIZE; i++) {
        crc ^= buffer[i];
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0xedb88320 : 0);
    }
    return ~crc;
}

static u32 count_primes(u8 *composite)
{
    u32 count = 0;
    for (u32 n = 0; n < PRIME_LIMIT; n++)
        composite[n] = 0;
    for (u32 n = 2; n < PRIME_LIMIT; n++) {
        if (composite[n])
            continue;
        count++;
        for (u32 multiple = 2 * n; multiple < PRIME_LIMIT; multiple += n)
            composite[multiple] = 1;
    }
    return count;
}

static void compute(struct cpu *cpu)
{
    u8 *buffer = buffers[cpu->index];

    for (int i = 0; i < COUNTS_PER_CPU; i++)
        __atomic_fetch_add(&shared_count, 1, __ATOMIC_RELAXED);
    cpu->checksum = checksum(buffer, cpu->index + 1);
    cpu->primes = count_primes(buffer);
    expect(cpu, cpu->primes == PRIMES_BELOW_LIMIT, "compute: primes");
}

void run_workload(struct cpu *cpu)
{
    expect(cpu, this_cpu() == cpu, "launch: GS base");
    expect(cpu, hypercall(HYPERCALL_WHO_AM_I, 0) == cpu->index, "hypercall: who am I");
    use_cpuid(cpu);
    use_msrs(cpu);
    use_port(cpu);
    use_hole(cpu);
    use_faults(cpu);
    halt();
    expect(cpu, cpu->exits[EXIT_OF_HALT] == 1, "halt: L1 saw it");
    compute(cpu);
}
