/*
 * From L1 to L2 and back.  `world_switch` is called by what will be L2: it leaves on L1's stack
 * into the loop, and the same call returns in L2 once VMRUN has begun to run it.
 */

/* struct cpu in hypervisor.h; `hypervisor.c` checks these. */
#define CPU_HOST_STACK 8
#define CPU_CONTROL 16
#define CPU_HOST_STATE 24
#define CPU_REGISTERS 32
#define REGISTER(n) (CPU_REGISTERS + 8 * (n))

    .text
    .globl world_switch
world_switch:                           /* RDI: struct cpu */
    pushq   %rbx
    pushq   %rbp
    pushq   %r12
    pushq   %r13
    pushq   %r14
    pushq   %r15
    leaq    guest_begins(%rip), %rsi
    movq    %rsp, %rdx
    movq    CPU_HOST_STACK(%rdi), %rsp
    pushq   %rdi                        /* stays at the stack's top */
    pushq   %rdi                        /* keeps calls aligned */
    call    enter_host                  /* (cpu, L2's RIP, L2's RSP) */
    jmp     run

    .globl world_start
world_start:                            /* RDI: struct cpu, whose VMCB is complete */
    movq    CPU_HOST_STACK(%rdi), %rsp
    pushq   %rdi
    pushq   %rdi

run:
    movq    (%rsp), %rdi
    movq    REGISTER(1)(%rdi), %rbx
    movq    REGISTER(2)(%rdi), %rcx
    movq    REGISTER(3)(%rdi), %rdx
    movq    REGISTER(4)(%rdi), %rsi
    movq    REGISTER(6)(%rdi), %rbp
    movq    REGISTER(7)(%rdi), %r8
    movq    REGISTER(8)(%rdi), %r9
    movq    REGISTER(9)(%rdi), %r10
    movq    REGISTER(10)(%rdi), %r11
    movq    REGISTER(11)(%rdi), %r12
    movq    REGISTER(12)(%rdi), %r13
    movq    REGISTER(13)(%rdi), %r14
    movq    REGISTER(14)(%rdi), %r15
    movq    CPU_CONTROL(%rdi), %rax
    movq    REGISTER(5)(%rdi), %rdi
    vmload  %rax                        /* FS, GS, TR, LDTR, system call registers */
    vmrun   %rax                        /* RAX and RSP of L2 are in the VMCB */
    vmsave  %rax

    movq    (%rsp), %rax
    movq    %rbx, REGISTER(1)(%rax)
    movq    %rcx, REGISTER(2)(%rax)
    movq    %rdx, REGISTER(3)(%rax)
    movq    %rsi, REGISTER(4)(%rax)
    movq    %rdi, REGISTER(5)(%rax)
    movq    %rbp, REGISTER(6)(%rax)
    movq    %r8, REGISTER(7)(%rax)
    movq    %r9, REGISTER(8)(%rax)
    movq    %r10, REGISTER(9)(%rax)
    movq    %r11, REGISTER(10)(%rax)
    movq    %r12, REGISTER(11)(%rax)
    movq    %r13, REGISTER(12)(%rax)
    movq    %r14, REGISTER(13)(%rax)
    movq    %r15, REGISTER(14)(%rax)
    movq    %rax, %rdi
    movq    CPU_HOST_STATE(%rdi), %rax
    vmload  %rax                        /* L1's own FS, GS, TR and so on */
    call    handle_exit
    testb   %al, %al
    jnz     run

    movq    (%rsp), %rdi
    call    leave_host
    movq    (%rsp), %rdi
    leaq    CPU_REGISTERS(%rdi), %rsp   /* struct registers, then struct return_frame */
    popq    %rax
    popq    %rbx
    popq    %rcx
    popq    %rdx
    popq    %rsi
    popq    %rdi
    popq    %rbp
    popq    %r8
    popq    %r9
    popq    %r10
    popq    %r11
    popq    %r12
    popq    %r13
    popq    %r14
    popq    %r15
    iretq

guest_begins:
    popq    %r15
    popq    %r14
    popq    %r13
    popq    %r12
    popq    %rbp
    popq    %rbx
    ret

    .section .note.GNU-stack, "", @progbits
