/* What makes L2 exit. */
#include "control.h"
#include "cpu.h"
#include "machine.h"

static u8 io_bitmaps[2][PAGE_SIZE] ALIGNED(4096);
static u8 msr_bitmap[PAGE_SIZE] ALIGNED(4096);

static void intercept_port(u16 port)
{
    io_bitmaps[port >> 15][(port & 0x7fff) / 8] |= (u8)(1 << port % 8);
}

/* "MSR-Bitmap Address": reads of low and high registers, then writes, 1 KiB each. */
static void intercept_msr(u32 msr)
{
    u32 half = msr >= 0xc0000000 ? 0x400 : 0;
    u32 bit = msr & 0x1fff;
    msr_bitmap[half + bit / 8] |= (u8)(1 << bit % 8);
    msr_bitmap[0x800 + half + bit / 8] |= (u8)(1 << bit % 8);
}

void build_intercept_maps(void)
{
    for (u16 i = 0; i < EMULATED_PORT_COUNT; i++)
        intercept_port(EMULATED_PORT + i);
    intercept_msr(MSR_SYSENTER_EIP);
}

/* Appendix "Reserved Controls and Default Settings": the low half must be 1, the high half may. */
static u32 adjust(u32 msr, u32 needed, u32 wanted)
{
    u64 capability = rdmsr(msr);
    u32 must = (u32)capability, may = (u32)(capability >> 32);
    if (needed & ~may)
        panic(FAILED_SUPPORT, "controls 0x%x are not allowed by the capability register 0x%x",
              needed & ~may, msr);
    return ((needed | wanted) & may) | must;
}

void set_controls(void)
{
    bool has_true = rdmsr(MSR_VMX_BASIC) & BASIC_TRUE_CONTROLS;

    vmwrite(PIN_CONTROLS, adjust(has_true ? MSR_VMX_TRUE_PIN : MSR_VMX_PIN, 0, 0));
    vmwrite(PROCESSOR_CONTROLS,
            adjust(has_true ? MSR_VMX_TRUE_PROCESSOR : MSR_VMX_PROCESSOR,
                   HLT_EXITING | USE_IO_BITMAPS | USE_MSR_BITMAPS | USE_SECONDARY, 0));
    vmwrite(SECONDARY_CONTROLS,
            adjust(MSR_VMX_SECONDARY, ENABLE_EPT,
                   ENABLE_RDTSCP | ENABLE_INVPCID | ENABLE_XSAVES | UNRESTRICTED_GUEST |
                       (machine.features.vpid ? ENABLE_VPID : 0)));
    vmwrite(EXIT_CONTROLS, adjust(has_true ? MSR_VMX_TRUE_EXIT : MSR_VMX_EXIT, EXIT_TO_64_BIT,
                                  EXIT_SAVES_EFER | EXIT_LOADS_EFER));
    vmwrite(ENTRY_CONTROLS, adjust(has_true ? MSR_VMX_TRUE_ENTRY : MSR_VMX_ENTRY, ENTRY_TO_64_BIT,
                                   ENTRY_LOADS_EFER));
    vmwrite(IO_BITMAP_A, physical(io_bitmaps[0]));
    vmwrite(IO_BITMAP_B, physical(io_bitmaps[1]));
    vmwrite(MSR_BITMAP, physical(msr_bitmap));
    vmwrite(EXCEPTION_BITMAP, 0);
    vmwrite(CR3_TARGET_COUNT, 0);
    vmwrite(EXIT_MSR_STORE_COUNT, 0);
    vmwrite(EXIT_MSR_LOAD_COUNT, 0);
    vmwrite(ENTRY_MSR_LOAD_COUNT, 0);
    vmwrite(ENTRY_INTERRUPTION, 0);
    vmwrite(VMCS_LINK_POINTER, ~0ULL); /* none */
    vmwrite(EPT_POINTER, machine.nested_root);
    if (vmread(SECONDARY_CONTROLS) & ENABLE_VPID)
        vmwrite(VPID, L2_VPID);
}
