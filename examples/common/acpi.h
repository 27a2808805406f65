/* Which processors does this machine have? */
#pragma once

#include "types.h"

/*
 * Local APIC identifiers of the processors that can be used, at most `most` of them, as the first
 * of these says: the ACPI MADT, QEMU's fw_cfg, CPUID.  Returns how many; the order is the table's.
 */
unsigned find_processors(u32 *apic_ids, unsigned most);
