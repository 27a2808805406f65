/* Nested page tables: in the form of ordinary long-mode tables, walked as user accesses. */
#include "control.h"
#include "apic.h"
#include "cpu.h"
#include "hypervisor.h"
#include "machine.h"

/* APM volume 2, "Nested Paging". */
enum { PRESENT = 1 << 0, WRITABLE = 1 << 1, USER = 1 << 2, UNCACHED = 3 << 3, LARGE = 1 << 7 };
enum { TABLE = PRESENT | WRITABLE | USER, LEAF = PRESENT | WRITABLE | USER };
#define ADDRESS 0x000ffffffffff000ULL

enum level { LEVEL_4K = 0, LEVEL_2M = 1, LEVEL_1G = 2, LEVEL_TOP = 3 };

static struct lock tables_lock;

static u64 *entry_in(u64 *table, u64 guest_physical, enum level level)
{
    return &table[guest_physical >> (12 + 9 * level) & 511];
}

/* The entry that maps an address at a level; tables above it are made on the way. */
static u64 *find_entry(u64 guest_physical, enum level level)
{
    u64 *table = pointer(machine.nested_root & ADDRESS);
    for (enum level at = LEVEL_TOP; at > level; at--) {
        u64 *entry = entry_in(table, guest_physical, at);
        if (!(*entry & PRESENT))
            *entry = physical(allocate_page()) | TABLE;
        if (*entry & LARGE)
            panic(FAILED_ENTRY, "guest-physical 0x%lx is inside a larger page", guest_physical);
        table = pointer(*entry & ADDRESS);
    }
    return entry_in(table, guest_physical, level);
}

static void map_range(u64 from, u64 to, enum level level, u64 type)
{
    u64 size = BIT(12 + 9 * level);
    for (u64 address = from & ~(size - 1); address < to; address += size)
        *find_entry(address, level) = address | LEAF | type | (level == LEVEL_4K ? 0 : LARGE);
}

void build_nested_tables(void)
{
    u64 size = machine.options.page_size;
    enum level level = size == GIB(1) ? LEVEL_1G : size == MIB(2) ? LEVEL_2M : LEVEL_4K;

    machine.nested_root = physical(allocate_page());
    map_range(0, machine.memory_top, level, 0);
    if (!machine.options.trap_apic)
        map_range(APIC_PAGE, APIC_PAGE + PAGE_SIZE, level, UNCACHED);
}

void map_nested_page(u64 guest_physical, u64 host_physical)
{
    lock(&tables_lock);
    *find_entry(guest_physical, LEVEL_4K) = host_physical | LEAF;
    unlock(&tables_lock);
}

void unmap_nested_page(struct cpu *cpu, u64 guest_physical)
{
    struct vmcb *vmcb = cpu->control;
    lock(&tables_lock);
    *find_entry(guest_physical, LEVEL_4K) = 0;
    unlock(&tables_lock);
    vmcb->tlb_control = machine.features.flush_by_asid ? TLB_FLUSH_GUEST : TLB_FLUSH_ALL;
}
