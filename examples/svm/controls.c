/* What makes L2 exit. */
#include "control.h"
#include "cpu.h"
#include "interrupts.h"

/* The L2 of every processor has the same number: the processors have translations of their own. */
enum { ASID = 1 };

static u8 io_map[3 * PAGE_SIZE] ALIGNED(4096);
static u8 msr_map[2 * PAGE_SIZE] ALIGNED(4096);

static void intercept_port(u16 port) { io_map[port / 8] |= (u8)(1 << port % 8); }

/* "MSR Intercepts": two bits for each register, read and write. */
static void intercept_msr(u32 msr)
{
    u32 bit = msr >= 0xc0000000 ? 0x800 * 8 + 2 * (msr - 0xc0000000) : 2 * msr;
    msr_map[bit / 8] |= (u8)(3 << bit % 8);
}

void build_intercept_maps(void)
{
    for (u16 i = 0; i < EMULATED_PORT_COUNT; i++)
        intercept_port(EMULATED_PORT + i);
    intercept_msr(MSR_SYSENTER_EIP);
    intercept_msr(MSR_EFER); /* L2 neither sees nor clears SVME */
}

void set_controls(struct vmcb *vmcb)
{
    if (machine.options.catch_init)
        vmcb->exceptions = 1U << VECTOR_SX;
    vmcb->word3 = INTERCEPT_CPUID | INTERCEPT_HLT | INTERCEPT_INVLPGA | INTERCEPT_IOIO |
                  INTERCEPT_MSR | INTERCEPT_SHUTDOWN;
    vmcb->word4 = INTERCEPT_VMRUN | INTERCEPT_VMMCALL | INTERCEPT_VMLOAD | INTERCEPT_VMSAVE |
                  INTERCEPT_STGI | INTERCEPT_CLGI | INTERCEPT_SKINIT;
    vmcb->io_map = physical(io_map);
    vmcb->msr_map = physical(msr_map);
    vmcb->asid = ASID;
    vmcb->tlb_control = TLB_FLUSH_ALL; /* once: who knows what was there before */
    vmcb->nested_control = NESTED_PAGING;
    vmcb->nested_cr3 = machine.nested_root;
}
