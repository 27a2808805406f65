/* What L2 begins as. */
#include "control.h"
#include "cpu.h"

static struct vmcb_segment capture_segment(u16 selector)
{
    struct segment s = read_segment(selector);
    u16 attributes = (u16)((s.attributes & 0xff) | (s.attributes >> 4 & 0xf00));
    return (struct vmcb_segment){s.selector, attributes, s.limit, s.base};
}

static struct vmcb_segment capture_table(struct table_register table)
{
    return (struct vmcb_segment){.limit = table.limit, .base = table.base};
}

/* L2 begins as what runs now.  VMSAVE adds FS, GS, TR, LDTR and the system call registers. */
void capture_state(struct vmcb *vmcb, u64 rip, u64 rsp)
{
    vmcb->es = capture_segment(read_es());
    vmcb->cs = capture_segment(read_cs());
    vmcb->ss = capture_segment(read_ss());
    vmcb->ds = capture_segment(read_ds());
    vmcb->gdtr = capture_table(read_gdtr());
    vmcb->idtr = capture_table(read_idtr());
    vmcb->cpl = 0;
    vmcb->efer = rdmsr(MSR_EFER);
    vmcb->cr0 = read_cr0();
    vmcb->cr2 = read_cr2();
    vmcb->cr3 = read_cr3();
    vmcb->cr4 = read_cr4();
    vmcb->dr6 = read_dr6();
    vmcb->dr7 = read_dr7();
    vmcb->rflags = 2;
    vmcb->rip = rip;
    vmcb->rsp = rsp;
    vmcb->pat = rdmsr(MSR_PAT);
    vmsave(vmcb);
}

/* L2 begins as a processor does after INIT and a startup IPI ("Processor Initialization State"). */
void set_startup_state(struct cpu *cpu)
{
    static const struct vmcb_segment data = {.attributes = 0x93, .limit = 0xffff};
    struct vmcb *vmcb = cpu->control;

    vmcb->es = vmcb->ss = vmcb->ds = vmcb->fs = vmcb->gs = data;
    vmcb->cs = (struct vmcb_segment){
        .selector = (u16)(cpu->startup_vector << 8),
        .base = cpu->startup_vector << 12,
        .attributes = 0x9b,
        .limit = 0xffff,
    };
    vmcb->gdtr.limit = vmcb->idtr.limit = 0xffff;
    vmcb->ldtr = (struct vmcb_segment){.attributes = 0x82, .limit = 0xffff};
    vmcb->tr = (struct vmcb_segment){.attributes = 0x8b, .limit = 0xffff};
    vmcb->efer = EFER_SVME; /* VMRUN insists */
    vmcb->cr0 = CR0_ET;
    vmcb->dr6 = 0xffff0ff0;
    vmcb->dr7 = 0x400;
    vmcb->rflags = 2;
    vmcb->pat = rdmsr(MSR_PAT);
    cpu->registers.rdx = cpuid(1, 0).eax;
}
