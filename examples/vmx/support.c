/* Is everything here that this hypervisor needs? */
#include "apic.h"
#include "control.h"
#include "cpu.h"
#include "console.h"
#include "machine.h"

/* IA32_VMX_EPT_VPID_CAP. */
#define EPT_FOUR_LEVELS BIT(6)
#define EPT_WRITE_BACK BIT(14)
#define EPT_2M BIT(16)
#define EPT_1G BIT(17)
#define EPT_INVEPT BIT(20)
#define EPT_INVEPT_SINGLE BIT(25)
#define EPT_INVVPID BIT(32)
#define EPT_INVVPID_SINGLE BIT(41)

static void check_ept(void)
{
    u64 capability = rdmsr(MSR_VMX_EPT_VPID);
    u64 size = machine.options.page_size;
    u64 needed = EPT_FOUR_LEVELS | EPT_WRITE_BACK | EPT_INVEPT |
                 (size == MIB(2) ? EPT_2M : size == GIB(1) ? EPT_1G : 0);

    if ((capability & needed) != needed)
        panic(FAILED_SUPPORT, "EPT of this processor lacks bits 0x%lx of IA32_VMX_EPT_VPID_CAP",
              needed & ~capability);
    machine.features.invept_single = capability & EPT_INVEPT_SINGLE;
    machine.features.vpid = (capability & EPT_INVVPID) && (capability & EPT_INVVPID_SINGLE) &&
                            (rdmsr(MSR_VMX_SECONDARY) >> 32 & ENABLE_VPID);
    if (machine.options.verbose)
        print("VMX basic 0x%lx, EPT and VPID 0x%lx\n", rdmsr(MSR_VMX_BASIC), capability);
}

void check_support(void)
{
    if (!(cpuid(1, 0).ecx & CPUID_VMX))
        panic(FAILED_SUPPORT, "this processor has no VMX");
    u64 control = rdmsr(MSR_FEATURE_CONTROL);
    if ((control & FEATURE_CONTROL_LOCKED) && !(control & FEATURE_CONTROL_VMX))
        panic(FAILED_SUPPORT, "the firmware has disabled VMX (IA32_FEATURE_CONTROL)");
    if (!(rdmsr(MSR_VMX_PROCESSOR) >> 32 & USE_SECONDARY) ||
        !(rdmsr(MSR_VMX_SECONDARY) >> 32 & ENABLE_EPT))
        panic(FAILED_SUPPORT, "this processor has no EPT");
    check_ept();
    if (machine.options.trap_apic && !apic_is_mapped())
        panic(FAILED_SUPPORT, "apic=trap needs the local APIC in xAPIC mode");
    if (machine.options.trap_apic && !(rdmsr(MSR_VMX_SECONDARY) >> 32 & UNRESTRICTED_GUEST))
        panic(FAILED_SUPPORT, "apic=trap needs unrestricted guests: L2 begins in real mode");
}
