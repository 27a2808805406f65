/* Virtualizing a processor while it runs: AMD APM volume 2, "Secure Virtual Machine". */
#include "hypervisor.h"

#include "control.h"
#include "cpu.h"
#include "console.h"
#include "interrupts.h"
#include "machine.h"

#define CPUID_EXTENDED 0x80000001U /* ECX bit 2: SVM; EDX bit 26: 1 GiB pages */
#define CPUID_SVM 0x8000000aU      /* EBX: ASIDs; EDX: features */
enum { FEATURE_NESTED_PAGING = 1 << 0, FEATURE_NEXT_RIP = 1 << 3, FEATURE_FLUSH_BY_ASID = 1 << 6 };

#define MSR_VM_CR 0xc0010114U
#define MSR_VM_HSAVE_PA 0xc0010117U
enum { VM_CR_SVM_DISABLED = 1 << 4 };

/* The L2 of every processor has the same number: the processors have translations of their own. */
enum { ASID = 1 };

const char vendor_name[] = "AMD SVM";
const char nested_paging_name[] = "NPT";
const char hypervisor_signature[13] = "ExampleOnSVM";

_Static_assert(offsetof(struct cpu, host_stack_top) == 8, "as in world.S");
_Static_assert(offsetof(struct cpu, control) == 16, "as in world.S");
_Static_assert(offsetof(struct cpu, host_state) == 24, "as in world.S");
_Static_assert(offsetof(struct cpu, registers) == 32, "as in world.S");
_Static_assert(offsetof(struct cpu, return_frame) == 32 + sizeof(struct registers), "world.S");

static u8 io_map[3 * PAGE_SIZE] ALIGNED(4096);
static u8 msr_map[2 * PAGE_SIZE] ALIGNED(4096);

void world_switch(struct cpu *cpu);
void enter_host(struct cpu *cpu, u64 rip, u64 rsp);
void leave_host(struct cpu *cpu);

/* "VMLOAD and VMSAVE Instructions", "Global Interrupt Flag, STGI and CLGI Instructions". */
static void vmsave(void *vmcb) { asm volatile("vmsave %0" : : "a"(vmcb) : "memory"); }
static void vmload(void *vmcb) { asm volatile("vmload %0" : : "a"(vmcb) : "memory"); }
static void clgi(void) { asm volatile("clgi" : : : "memory"); }
static void stgi(void) { asm volatile("stgi" : : : "memory"); }

void check_support(void)
{
    if (cpuid(0x80000000, 0).eax < CPUID_SVM || !(cpuid(CPUID_EXTENDED, 0).ecx & BIT(2)))
        panic(FAILED_SUPPORT, "this processor has no SVM");
    if (rdmsr(MSR_VM_CR) & VM_CR_SVM_DISABLED)
        panic(FAILED_SUPPORT, "the firmware has disabled SVM (VM_CR.SVMDIS)");
    struct cpuid svm = cpuid(CPUID_SVM, 0);
    if (!(svm.edx & FEATURE_NESTED_PAGING))
        panic(FAILED_SUPPORT, "this processor has no nested paging");
    if (machine.options.page_size == GIB(1) && !(cpuid(CPUID_EXTENDED, 0).edx & BIT(26)))
        panic(FAILED_SUPPORT, "this processor has no pages of 1 GiB");
    machine.features.next_rip = svm.edx & FEATURE_NEXT_RIP;
    machine.features.flush_by_asid = svm.edx & FEATURE_FLUSH_BY_ASID;
    if (machine.options.verbose)
        print("SVM revision %u, %u ASIDs, features 0x%x\n", svm.eax & 0xff, svm.ebx, svm.edx);
}

static void intercept_port(u16 port) { io_map[port / 8] |= (u8)(1 << port % 8); }

/* "MSR Intercepts": two bits for each register, read and write. */
static void intercept_msr(u32 msr)
{
    u32 bit = msr >= 0xc0000000 ? 0x800 * 8 + 2 * (msr - 0xc0000000) : 2 * msr;
    msr_map[bit / 8] |= (u8)(3 << bit % 8);
}

static void set_controls(struct vmcb *vmcb)
{
    for (u16 i = 0; i < EMULATED_PORT_COUNT; i++)
        intercept_port(EMULATED_PORT + i);
    intercept_msr(MSR_SYSENTER_EIP);
    intercept_msr(MSR_EFER); /* L2 neither sees nor clears SVME */

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
static void capture_state(struct vmcb *vmcb, u64 rip, u64 rsp)
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

static void enable(struct cpu *cpu)
{
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_SVME);
    wrmsr(MSR_VM_HSAVE_PA, physical(cpu->host_save));
}

void virtualize_this_cpu(struct cpu *cpu)
{
    cpu->control = allocate_page();
    cpu->host_state = allocate_page();
    cpu->host_save = allocate_page();
    interrupts_off();
    enable(cpu);
    world_switch(cpu);
}

/* On L1's stack, before the first VMRUN. */
void enter_host(struct cpu *cpu, u64 rip, u64 rsp)
{
    clgi(); /* from here on nothing interrupts L1 */
    set_controls(cpu->control);
    capture_state(cpu->control, rip, rsp);

    load_descriptors(&cpu->host_descriptors, machine.host_interrupt_table);
    wrmsr(MSR_GS_BASE, physical(cpu));
    vmsave(cpu->host_state);
    cpu->level = 2;
}

/* After the last exit: L2's state becomes the processor's own. */
void leave_host(struct cpu *cpu)
{
    struct vmcb *vmcb = cpu->control;

    load_descriptors(&cpu->guest_descriptors, machine.guest_interrupt_table);
    vmload(vmcb);
    cpu->return_frame = (struct return_frame){
        vmcb->rip, vmcb->cs.selector, vmcb->rflags, vmcb->rsp, vmcb->ss.selector,
    };
    stgi();
    wrmsr(MSR_EFER, vmcb->efer & ~(u64)EFER_SVME);
    wrmsr(MSR_VM_HSAVE_PA, 0);
    cpu->level = 1;
}

u64 read_guest_sysenter_esp(struct cpu *cpu)
{
    const struct vmcb *vmcb = cpu->control;
    return vmcb->sysenter_esp;
}

u64 hypercall(enum hypercall number, u64 argument)
{
    u64 result;
    asm volatile("vmmcall" : "=a"(result) : "a"((u64)number), "D"(argument) : "memory");
    return result;
}

const char *check_virtualization_is_hidden(void)
{
    return rdmsr(MSR_EFER) & EFER_SVME ? "hiding: L2 sees EFER.SVME" : NULL;
}

u64 try_virtualization_instruction(void)
{
    fault_t fault = 0;
    asm volatile("1: clgi\n" FIXUP : "+a"(fault));
    return fault;
}
