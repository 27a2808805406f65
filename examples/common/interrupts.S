/* Every vector's way into C: a stub that pushes its number, then one common frame. */

    .text
    .globl interrupt_stubs
    .align 16
interrupt_stubs:
    .set    vector, 0
    .rept   256
    .align  16
    .if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 \
          || vector == 29 || vector == 30)
    pushq   $0                          /* where the processor pushes no error code */
    .endif
    pushq   $vector
    jmp     common
    .set    vector, vector + 1
    .endr

common:                                 /* struct interrupt_frame in interrupts.h */
    pushq   %rax
    pushq   %rbx
    pushq   %rcx
    pushq   %rdx
    pushq   %rsi
    pushq   %rdi
    pushq   %rbp
    pushq   %r8
    pushq   %r9
    pushq   %r10
    pushq   %r11
    pushq   %r12
    pushq   %r13
    pushq   %r14
    pushq   %r15
    movq    %rsp, %rdi
    call    handle_interrupt
    popq    %r15
    popq    %r14
    popq    %r13
    popq    %r12
    popq    %r11
    popq    %r10
    popq    %r9
    popq    %r8
    popq    %rbp
    popq    %rdi
    popq    %rsi
    popq    %rdx
    popq    %rcx
    popq    %rbx
    popq    %rax
    addq    $16, %rsp                   /* vector and error code */
    iretq

    .section .note.GNU-stack, "", @progbits
