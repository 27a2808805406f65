# Every exception is the answer to the operation that caused it; interrupts and NMIs are counted.

.balign 16
stubs:
.set vector, 0
.rept 256
    .balign 16
    # SDM 3A, "Exception and Interrupt Reference": which vectors push an error code
    .if (vector != 8) && (vector != 17) && (vector != 21) && (vector != 29) && (vector != 30) && ((vector < 10) || (vector > 14))
    push $0
    .endif
    push $vector
    jmp interrupted
    .set vector, vector + 1
.endr

.balign 16
interrupted:                        # vector, error code, RIP, CS, RFLAGS, RSP, SS
    push %rax
    push %rbx
    push %rcx
    push %rdx
    mov %rsp, %rbx
    and $-BLOCK_SIZE, %rbx
    mov 32(%rsp), %rcx
    bt %rcx, C_RESUME(%rbx)
    jnc fault
    lock incl C_COUNTS(%rbx,%rcx,4)
    cmp $32, %ecx
    jb 1f
    push %rdi
    push %rsi
    mov $0xb0, %edi                 # EOI
    xor %esi, %esi
    call apic_write
    pop %rsi
    pop %rdi
1:  pop %rdx
    pop %rcx
    pop %rbx
    pop %rax
    add $16, %rsp
    iretq

fault:
    pop C_GPRS + 16(%rbx)
    pop C_GPRS + 8(%rbx)
    pop C_GPRS + 24(%rbx)
    pop C_GPRS(%rbx)
    mov %rbp, C_GPRS + 40(%rbx)
    mov %rsi, C_GPRS + 48(%rbx)
    mov %rdi, C_GPRS + 56(%rbx)
    .irp number, 8, 9, 10, 11, 12, 13, 14, 15
    mov %r\number, C_GPRS + 8 * \number(%rbx)
    .endr
    pop C_FAULT(%rbx)
    pop C_FAULT + 8(%rbx)
    pop C_FAULT + 16(%rbx)
    pop C_FAULT + 24(%rbx)
    pop C_GPRS + 32(%rbx)
    pop C_FAULT + 32(%rbx)
    mov %cr2, %rax
    mov %rax, C_FAULT + 40(%rbx)
    mov %rbx, %r12
    cmpl $1, C_ACTIVE(%rbx)
    jne panic
    # By IRET, so that NMIs are unblocked and RFLAGS are clean.
    push $DATA
    push C_SAVED(%rbx)
    push $2
    push $CODE64
    push $recovered
    iretq
recovered:
    mov $DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov C_OUT(%r12), %rdi
    add $8, %rdi
    lea C_FAULT(%r12), %rsi
    mov $6, %ecx
    rep movsq
    call registers_out
    mov $STATUS_FAULT, %eax
    jmp op_done

panic:                              # outside any operation: say so and stop
    movl $3, C_STATE(%r12)
    cmpl $0, C_INDEX(%r12)
    jne dead
    lea C_STACK(%r12), %rsp
    lea C_FAULT(%r12), %rsi
    mov $48, %ecx
    mov $KIND_PANIC, %eax
    call send_frame
    jmp dead
