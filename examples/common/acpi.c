#include "acpi.h"

#include "cpu.h"

/* ACPI specification, "Root System Description Pointer". */
struct PACKED root_pointer {
    char signature[8];
    u8 checksum;
    char oem[6];
    u8 revision;
    u32 rsdt;
    u32 length;
    u64 xsdt;
    u8 extended_checksum;
    u8 reserved[3];
};

/* "System Description Table Header". */
struct PACKED table {
    char signature[4];
    u32 length;
    u8 revision;
    u8 checksum;
    char oem[6], oem_table[8];
    u32 oem_revision, creator, creator_revision;
    u8 body[];
};

/* "Multiple APIC Description Table": entries of type 0 and 9 are processors. */
enum { MADT_ENTRIES = 8, LOCAL_APIC = 0, LOCAL_X2APIC = 9, ENABLED = 1 };
struct PACKED madt_entry {
    u8 type, length;
    union {
        struct PACKED {
            u8 processor, apic_id;
            u32 flags;
        } local_apic;
        struct PACKED {
            u16 reserved;
            u32 apic_id, flags, processor;
        } local_x2apic;
    };
};

enum { FW_CFG_SELECT = 0x510, FW_CFG_DATA = 0x511, FW_CFG_SIGNATURE = 0, FW_CFG_CPU_COUNT = 5 };

static bool same(const void *a, const char *b, unsigned length)
{
    for (unsigned i = 0; i < length; i++)
        if (((const char *)a)[i] != b[i])
            return false;
    return true;
}

static bool sums_to_zero(const void *bytes, u32 length)
{
    u8 sum = 0;
    for (u32 i = 0; i < length; i++)
        sum += ((const u8 *)bytes)[i];
    return sum == 0;
}

static const struct root_pointer *search(u64 from, u64 to)
{
    for (u64 at = from; at + 20 <= to; at += 16) {
        const struct root_pointer *root = pointer(at);
        if (same(root->signature, "RSD PTR ", 8) && sums_to_zero(root, 20))
            return root;
    }
    return NULL;
}

static const struct root_pointer *find_root(void)
{
    u64 extended_bios_data = (u64) * (volatile u16 *)pointer(0x40e) << 4;
    const struct root_pointer *root = NULL;
    if (extended_bios_data >= 0x400 && extended_bios_data < 0xa0000)
        root = search(extended_bios_data, extended_bios_data + KIB(1));
    return root ? root : search(0xe0000, 0x100000);
}

static const struct table *checked(u64 address, const char *signature)
{
    const struct table *table = pointer(address);
    if (address == 0 || address >= GIB(4) || !same(table->signature, signature, 4))
        return NULL;
    bool sound = table->length >= sizeof *table && table->length < MIB(1) &&
                 sums_to_zero(table, table->length);
    return sound ? table : NULL;
}

/* Reads `size` bytes, little-endian, wherever they lie. */
static u64 read_unaligned(const u8 *bytes, unsigned size)
{
    u64 value = 0;
    for (unsigned i = 0; i < size; i++)
        value |= (u64)bytes[i] << (8 * i);
    return value;
}

static const struct table *find_madt(void)
{
    const struct root_pointer *root = find_root();
    if (!root)
        return NULL;
    unsigned entry_size = 8;
    const struct table *list = root->revision >= 2 ? checked(root->xsdt, "XSDT") : NULL;
    if (!list) {
        entry_size = 4;
        list = checked(root->rsdt, "RSDT");
    }
    if (!list)
        return NULL;
    for (u32 at = 0; sizeof *list + at + entry_size <= list->length; at += entry_size) {
        const struct table *madt = checked(read_unaligned(list->body + at, entry_size), "APIC");
        if (madt)
            return madt;
    }
    return NULL;
}

static unsigned processors_of_madt(u32 *apic_ids, unsigned most)
{
    const struct table *madt = find_madt();
    if (!madt)
        return 0;
    const u8 *at = madt->body + MADT_ENTRIES;
    const u8 *end = (const u8 *)madt + madt->length;
    unsigned count = 0;
    while (at + 2 <= end && count < most) {
        const struct madt_entry *entry = (const void *)at;
        if (entry->length < 2 || at + entry->length > end)
            break;
        if (entry->type == LOCAL_APIC && (entry->local_apic.flags & ENABLED))
            apic_ids[count++] = entry->local_apic.apic_id;
        else if (entry->type == LOCAL_X2APIC && (entry->local_x2apic.flags & ENABLED))
            apic_ids[count++] = entry->local_x2apic.apic_id;
        at += entry->length;
    }
    return count;
}

static void read_fw_cfg(u16 key, u8 *bytes, unsigned count)
{
    outw(FW_CFG_SELECT, key);
    for (unsigned i = 0; i < count; i++)
        bytes[i] = inb(FW_CFG_DATA);
}

static unsigned processors_of_fw_cfg(void)
{
    u8 bytes[4];
    read_fw_cfg(FW_CFG_SIGNATURE, bytes, 4);
    if (!same(bytes, "QEMU", 4))
        return 0;
    read_fw_cfg(FW_CFG_CPU_COUNT, bytes, 2);
    return (unsigned)read_unaligned(bytes, 2);
}

static unsigned processors_of_cpuid(void)
{
    struct cpuid features = cpuid(1, 0);
    bool has_count = features.edx & BIT(28); /* HTT: EBX[23:16] is valid */
    unsigned count = features.ebx >> 16 & 0xff;
    return has_count && count ? count : 1;
}

unsigned find_processors(u32 *apic_ids, unsigned most)
{
    unsigned count = processors_of_madt(apic_ids, most);
    if (count)
        return count;
    count = processors_of_fw_cfg();
    if (!count)
        count = processors_of_cpuid();
    if (count > most)
        count = most;
    for (unsigned i = 0; i < count; i++)
        apic_ids[i] = i;
    return count;
}
