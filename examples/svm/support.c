/* Is everything here that this hypervisor needs? */
#include "apic.h"
#include "control.h"
#include "cpu.h"
#include "console.h"
#include "machine.h"

#define CPUID_1G_PAGES BIT(26)     /* EDX of the extended leaf */
#define CPUID_SVM_LEAF 0x8000000aU /* EBX: ASIDs; EDX: features */
enum { FEATURE_NESTED_PAGING = 1 << 0, FEATURE_NEXT_RIP = 1 << 3, FEATURE_FLUSH_BY_ASID = 1 << 6 };

void check_support(void)
{
    struct cpuid extended = cpuid(CPUID_EXTENDED, 0);
    if (!(extended.ecx & CPUID_SVM) || cpuid(0x80000000, 0).eax < CPUID_SVM_LEAF)
        panic(FAILED_SUPPORT, "this processor has no SVM");
    if (rdmsr(MSR_VM_CR) & VM_CR_SVM_DISABLED)
        panic(FAILED_SUPPORT, "the firmware has disabled SVM (VM_CR.SVMDIS)");
    struct cpuid svm = cpuid(CPUID_SVM_LEAF, 0);
    if (!(svm.edx & FEATURE_NESTED_PAGING))
        panic(FAILED_SUPPORT, "this processor has no nested paging");
    if (machine.options.page_size == GIB(1) && !(extended.edx & CPUID_1G_PAGES))
        panic(FAILED_SUPPORT, "this processor has no pages of 1 GiB");
    if (machine.options.trap_apic && !apic_is_mapped())
        panic(FAILED_SUPPORT, "apic=trap needs the local APIC in xAPIC mode");
    machine.features.next_rip = svm.edx & FEATURE_NEXT_RIP;
    machine.features.flush_by_asid = svm.edx & FEATURE_FLUSH_BY_ASID;
    if (machine.options.verbose)
        print("SVM revision %u, %u ASIDs, features 0x%x\n", svm.eax & 0xff, svm.ebx, svm.edx);
}
