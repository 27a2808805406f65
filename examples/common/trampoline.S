/*
 * How an application processor goes from its startup IPI to 64-bit C.  This code is copied to a
 * page below 1 MiB.  Every address in it is relative to that page; `smp.c` fills in the parameters
 * and adds the page's address to the pointers.
 */

#define AT(label) (label - trampoline)

    .section .rodata
    .code16
    .align 16
    .globl trampoline, trampoline_end
trampoline:
    cli
    cld
    movw    %cs, %ax                    /* the page's number was the startup vector */
    movw    %ax, %ds
    movzwl  %ax, %ebx
    shll    $4, %ebx                    /* EBX: where the page is */
    lgdtl   AT(gdt_register)
    movl    %cr0, %eax
    andl    $0x1fffffff, %eax           /* INIT leaves the caches off (CD, NW) */
    orl     $1, %eax                    /* PE */
    movl    %eax, %cr0
    ljmpl   *AT(protected_mode_pointer)

    .code32
protected_mode:
    movl    $0x18, %eax
    movl    %eax, %ds
    movl    %eax, %es
    movl    %eax, %ss
    movl    %cr4, %eax
    orl     $0x20, %eax                 /* PAE */
    movl    %eax, %cr4
    movl    AT(parameter_page_map)(%ebx), %eax
    movl    %eax, %cr3
    movl    $0xc0000080, %ecx           /* EFER.LME; whatever else is set stays */
    rdmsr
    orl     $0x100, %eax
    wrmsr
    movl    %cr0, %eax
    orl     $0x80010032, %eax           /* PG, WP, NE, ET, MP */
    movl    %eax, %cr0
    ljmp    *AT(long_mode_pointer)(%ebx)

    .code64
long_mode:
    xorl    %eax, %eax
    movl    %eax, %fs
    movl    %eax, %gs
    movq    AT(parameter_stack)(%rbx), %rsp
    movq    AT(parameter_argument)(%rbx), %rdi
    xorl    %ebp, %ebp
    call    *AT(parameter_entry)(%rbx)
    ud2

    .align 8
trampoline_gdt:
    .quad   0
    .quad   0x00af9b000000ffff          /* 0x08: 64-bit code */
    .quad   0x00cf9b000000ffff          /* 0x10: 32-bit code */
    .quad   0x00cf93000000ffff          /* 0x18: data */
gdt_register:
    .word   . - trampoline_gdt - 1
    .globl trampoline_gdt_base
trampoline_gdt_base:
    .long   AT(trampoline_gdt)
    .globl trampoline_protected_mode
trampoline_protected_mode:
protected_mode_pointer:
    .long   AT(protected_mode)
    .word   0x10
    .globl trampoline_long_mode
trampoline_long_mode:
long_mode_pointer:
    .long   AT(long_mode)
    .word   0x08

    .align 8
    .globl trampoline_parameters
trampoline_parameters:                  /* struct trampoline_parameters in smp.c */
parameter_page_map:     .quad 0
parameter_stack:        .quad 0
parameter_entry:        .quad 0
parameter_argument:     .quad 0
trampoline_end:

    .section .note.GNU-stack, "", @progbits
