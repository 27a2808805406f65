/*
 * The seam: what the common code knows of a hypervisor, and what a hypervisor knows of it.
 * `svm/` and `vmx/` implement the functions at the end, in files of the same names.
 */
#pragma once

#include "descriptors.h"
#include "types.h"

#define MOST_CPUS 8
#define STACK_SIZE KIB(16)

/* What L2 can ask of L1, by RAX; arguments in RDI and RSI, the answer in RAX. */
enum hypercall {
    HYPERCALL_WHO_AM_I,     /* the processor's index */
    HYPERCALL_READ_STATE,   /* L2's SYSENTER_ESP as the control block holds it */
    HYPERCALL_UNMAP,        /* takes the page at guest-physical RDI away again */
    HYPERCALL_LEAVE,        /* goes on outside, as L1 */
};

/* CPUID leaf with the signature, and the model-specific register that only L1 knows. */
#define CPUID_HYPERVISOR 0x40000000U
#define MSR_UNKNOWN 0x40001234U

/* The port that L1 emulates: what is read is the complement of what was written. */
#define EMULATED_PORT 0x5a50
#define EMULATED_PORT_COUNT 4

/* Guest-physical addresses without memory: a 2 MiB window for each processor, mapped when used. */
#define HOLE_BASE GIB(2)
#define HOLE_SIZE MIB(2)
#define HOLE_PATTERN 0x686f6c65UL

enum exit_kind {
    EXIT_OF_CPUID,
    EXIT_OF_MSR,
    EXIT_OF_HYPERCALL,
    EXIT_OF_PORT,
    EXIT_OF_PAGE,
    EXIT_OF_HALT,
    EXIT_OF_INSTRUCTION, /* one that would touch the virtualization itself: L2 gets #UD */
    EXIT_KINDS,
};

/* L2's registers while L1 runs; RSP is in the control block.  In the order of `world.S`. */
struct registers {
    u64 rax, rbx, rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15;
};

/* What IRETQ takes. */
struct return_frame {
    u64 rip, cs, rflags, rsp, ss;
};

/* One processor.  `world.S` knows the place of the first members. */
struct cpu {
    struct cpu *self;                   /* for GS:0 */
    u8 *host_stack_top;
    void *control;                      /* VMCB or VMCS: what L2 is */
    void *host_state;                   /* SVM: VMSAVE area of L1; VMX: VMXON region */
    struct registers registers;
    struct return_frame return_frame;   /* directly after the registers */
    u64 launched;                       /* VMX: the next entry is VMRESUME, not VMLAUNCH */

    u32 index, apic_id;
    u32 level;                          /* 1 or 2: who runs here now */
    volatile u32 stage;
    const char *failure;                /* the first thing that L2 found wrong */
    u32 waits_for_startup, startup_vector; /* as L1 has it from L2's local APIC */

    void *host_save;                    /* SVM: VM_HSAVE_PA */
    struct descriptors guest_descriptors, host_descriptors;

    /* L2 reads what L1 wrote in between. */
    volatile u32 pings, faults, inits;
    volatile u32 exits[EXIT_KINDS];
    volatile u32 page_reads, page_writes;
    volatile u64 shadow_sysenter_eip; /* what L2 has in the register that L1 intercepts */
    u32 port_value;
    u32 checksum, primes;
};

/* How far a processor is.  Each stage is reached once, in this order; some leave out IN_HOST. */
enum stage { ABSENT, IN_HOST, STARTED, READY, VIRTUALIZED, WORKED, PINGED, BACK };

struct options {
    u64 page_size;      /* of the nested page tables: 4 KiB, 2 MiB or 1 GiB */
    bool trap_apic;     /* the processors are started by L2, whose local APIC L1 emulates */
    bool use_x2apic;    /* the local APIC is switched to x2APIC mode */
    bool catch_init;    /* an INIT for L2 comes to L1 */
    bool verbose;
};

/* What a processor may lack: all have the same, and the vendor's code says what it means. */
struct features {
    bool next_rip, flush_by_asid;       /* SVM */
    bool invept_single, vpid;           /* VMX */
};

struct machine {
    struct options options;
    u64 memory_top;
    u64 nested_root;            /* nCR3 or EPTP: one set of tables for all processors */
    struct features features;
    u32 cpu_count;
    struct cpu cpus[MOST_CPUS];
    u8 host_interrupt_table[4096], guest_interrupt_table[4096];
};
extern struct machine machine;

static inline struct cpu *this_cpu(void)
{
    struct cpu *cpu;
    asm volatile("mov %%gs:0, %0" : "=r"(cpu));
    return cpu;
}

/* emulate.c: what L1 does at the exits that both vendors have; the vendor's code moves RIP. */
enum verdict { RESUME, INJECT_GP, INJECT_UD, LEAVE };
void emulate_cpuid(struct cpu *cpu);
enum verdict emulate_rdmsr(struct cpu *cpu);
enum verdict emulate_wrmsr(struct cpu *cpu);
void emulate_port(struct cpu *cpu, u16 port, unsigned size, bool is_input);
void emulate_hole(struct cpu *cpu, u64 guest_physical, bool is_write);
enum verdict emulate_hypercall(struct cpu *cpu);

/* apic_trap.c: an access of L2 to its local APIC; returns the length of the instruction. */
unsigned emulate_apic(struct cpu *cpu, u64 rip, u64 guest_physical);

/* hypervisor.c of the vendor. */
extern const char vendor_name[];       /* "AMD SVM" */
extern const char nested_paging_name[];
extern const char catch_init_option[];  /* the word for it on the command line */
extern const char hypervisor_signature[13];
void check_support(void);               /* panics with what is missing */
void build_intercept_maps(void);
void virtualize_this_cpu(struct cpu *cpu); /* returns as L2 */
void NORETURN run_from_startup(struct cpu *cpu); /* L2 begins in real mode at startup_vector */
u64 read_guest_sysenter_esp(struct cpu *cpu);
u64 hypercall(enum hypercall number, u64 argument);
const char *check_virtualization_is_hidden(void);  /* in L2; NULL if it is */
u64 try_virtualization_instruction(void);          /* in L2; a fault_t */

/* nested_paging.c of the vendor. */
void build_nested_tables(void);
void map_nested_page(u64 guest_physical, u64 host_physical);
void unmap_nested_page(struct cpu *cpu, u64 guest_physical);
