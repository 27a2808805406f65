# Runs the operations of a request.  An operation: opcode, 0, length (2, 2, 4 bytes), arguments.
# Its answer: opcode, status, length, data.

# ecx bytes in C_REQUEST of block r12; C_RESPONSE_SIZE is the answer's.
interpret:
    lea C_REQUEST(%r12), %rax
    mov %rax, C_CURSOR(%r12)
    add %rcx, %rax
    mov %rax, C_END(%r12)
    lea C_RESPONSE(%r12), %rax
    mov %rax, C_OUT(%r12)
    add $RESPONSE_MOST, %rax
    mov %rax, C_OUT_END(%r12)
next_op:
    mov C_CURSOR(%r12), %rsi
    mov C_END(%r12), %rax
    sub %rsi, %rax
    sub $8, %rax
    jb finished
    mov C_OUT(%r12), %rdi
    lea 256(%rdi), %rcx
    cmp C_OUT_END(%r12), %rcx
    ja finished
    movzwl (%rsi), %ebx
    mov 4(%rsi), %ecx
    add $8, %rsi
    cmp %rcx, %rax
    jb finished
    lea (%rsi,%rcx), %rdx
    mov %rdx, C_CURSOR(%r12)
    mov %ebx, (%rdi)
    movl $0, 4(%rdi)
    add $8, %rdi
    movl $0, C_OUTMASK(%r12)
    mov %rsp, C_SAVED(%r12)
    movl $1, C_ACTIVE(%r12)
    mov $STATUS_UNKNOWN, %eax
    cmp $((operations_end - operations) / 8), %ebx
    jae op_done
    movzbl shortest(%rbx), %edx
    cmp %edx, %ecx
    jb op_done
    jmp *operations(,%rbx,8)

finished:
    lea C_RESPONSE(%r12), %rax
    mov C_OUT(%r12), %rcx
    sub %rax, %rcx
    mov %ecx, C_RESPONSE_SIZE(%r12)
    ret

# Status eax, data up to rdi.
op_ok:
    mov $STATUS_OK, %eax
op_done:
    movl $0, C_ACTIVE(%r12)
    mov C_OUT(%r12), %rdx
    mov %ax, 2(%rdx)
    mov %rdi, %rcx
    sub %rdx, %rcx
    sub $8, %ecx
    mov %ecx, 4(%rdx)
    mov %rdi, C_OUT(%r12)
    jmp next_op

# RFLAGS and the registers of C_OUTMASK to rdi.
registers_out:
    mov C_GPRS + 32(%r12), %rax
    stosq
    mov C_OUTMASK(%r12), %edx
    btr $4, %edx
    xor %ecx, %ecx
1:  bt %ecx, %edx
    jnc 2f
    mov C_GPRS(%r12,%rcx,8), %rax
    stosq
2:  inc %ecx
    cmp $16, %ecx
    jb 1b
    ret

# CALL: address or 0 (4), registers in (2), registers out (2), values, code where the address is 0
op_call:
    add %rsi, %rcx
    mov %rcx, %r8                   # the code's end
    mov (%rsi), %eax
    mov %rax, C_TARGET(%r12)
    movzwl 6(%rsi), %eax
    mov %eax, C_OUTMASK(%r12)
    movzwl 4(%rsi), %edx
    add $8, %rsi
    lea C_GPRS(%r12), %rdi
    xor %ecx, %ecx
1:  xor %eax, %eax
    bt %ecx, %edx
    jnc 2f
    lodsq
2:  stosq
    inc %ecx
    cmp $16, %ecx
    jb 1b
    orq $2, C_GPRS + 32(%r12)
    cmpq $0, C_TARGET(%r12)
    jne 3f
    lea C_SLOT(%r12), %rdi
    mov %rdi, C_TARGET(%r12)
    mov %r8, %rcx
    sub %rsi, %rcx
    cmp $0xf00, %rcx
    ja no_room
    rep movsb
    movb $0xc3, (%rdi)
3:  push $called
    push C_TARGET(%r12)
    push C_GPRS + 32(%r12)
    popfq
    mov C_GPRS(%r12), %rax
    mov C_GPRS + 8(%r12), %rcx
    mov C_GPRS + 16(%r12), %rdx
    mov C_GPRS + 24(%r12), %rbx
    mov C_GPRS + 40(%r12), %rbp
    mov C_GPRS + 48(%r12), %rsi
    mov C_GPRS + 56(%r12), %rdi
    .irp number, 8, 9, 10, 11, 13, 14, 15, 12
    mov C_GPRS + 8 * \number(%r12), %r\number
    .endr
    ret
called:
    pushfq
    cli
    push %rax
    mov %rsp, %rax
    and $-BLOCK_SIZE, %rax
    pop C_GPRS(%rax)
    pop C_GPRS + 32(%rax)
    mov %rcx, C_GPRS + 8(%rax)
    mov %rdx, C_GPRS + 16(%rax)
    mov %rbx, C_GPRS + 24(%rax)
    mov %rbp, C_GPRS + 40(%rax)
    mov %rsi, C_GPRS + 48(%rax)
    mov %rdi, C_GPRS + 56(%rax)
    .irp number, 8, 9, 10, 11, 12, 13, 14, 15
    mov %r\number, C_GPRS + 8 * \number(%rax)
    .endr
    mov %rax, %r12
    push $2
    popfq
    mov C_OUT(%r12), %rdi
    add $8, %rdi
    call registers_out
    jmp op_ok
no_room:
    mov C_OUT(%r12), %rdi
    add $8, %rdi
    mov $STATUS_NO_ROOM, %eax
    jmp op_done

# READ: address, size
op_read:
    mov 8(%rsi), %rcx
    mov (%rsi), %rsi
    mov C_OUT_END(%r12), %rax
    sub %rdi, %rax
    cmp %rcx, %rax
    jb no_room
    rep movsb
    jmp op_ok

# WRITE: address, bytes
op_write:
    mov %rdi, %rdx
    sub $8, %rcx
    lodsq
    mov %rax, %rdi
    rep movsb
    mov %rdx, %rdi
    jmp op_ok

# FILL: address, size, byte
op_fill:
    mov %rdi, %rdx
    mov (%rsi), %rdi
    mov 8(%rsi), %rcx
    mov 16(%rsi), %rax
    rep stosb
    mov %rdx, %rdi
    jmp op_ok

# COPY: to, from, size; as if through a buffer
op_copy:
    mov %rdi, %rdx
    mov (%rsi), %rdi
    mov 16(%rsi), %rcx
    mov 8(%rsi), %rsi
    mov %rdi, %rax
    sub %rsi, %rax
    cmp %rcx, %rax
    jae 1f
    lea -1(%rsi,%rcx), %rsi
    lea -1(%rdi,%rcx), %rdi
    std
1:  rep movsb
    cld
    mov %rdx, %rdi
    jmp op_ok

# The block of processor (%rsi) in rbx; CF where it does not run.
other:
    mov (%rsi), %ebx
    cmp online, %ebx
    jae 1f
    cmp $MAX_CPUS, %ebx
    jae 1f
    shl $17, %rbx
    add $BLOCKS, %rbx
    clc
    ret
1:  stc
    ret
no_processor:
    mov $STATUS_NO_PROCESSOR, %eax
    jmp op_done

# POST: processor (4), operations for it
op_post:
    mov %rdi, %rdx
    call other
    jc no_processor
    cmpl $0, C_STATE(%rbx)
    jne no_processor
    add $4, %rsi
    sub $4, %ecx
    mov %ecx, C_REQUEST_SIZE(%rbx)
    lea C_REQUEST(%rbx), %rdi
    rep movsb
    movl $1, C_STATE(%rbx)
    mov %rdx, %rdi
    jmp op_ok

# COLLECT: processor (4), polls (4); the processor's answers
op_collect:
    call other
    jc no_processor
    mov 4(%rsi), %ecx
1:  mov C_STATE(%rbx), %eax
    cmp $2, %eax
    je 2f
    cmp $1, %eax
    jne no_processor
    pause
    dec %ecx
    jnz 1b
    mov $STATUS_TIMEOUT, %eax
    jmp op_done
2:  mov C_RESPONSE_SIZE(%rbx), %ecx
    mov C_OUT_END(%r12), %rax
    sub %rdi, %rax
    cmp %rcx, %rax
    jb no_room
    lea C_RESPONSE(%rbx), %rsi
    rep movsb
    movl $0, C_STATE(%rbx)
    jmp op_ok

# An AP, for ever: its mailbox.
parked:
    lea C_STACK(%r12), %rsp
    cmpl $1, C_STATE(%r12)
    je 1f
    pause
    jmp parked
1:  mov C_REQUEST_SIZE(%r12), %ecx
    call interpret
    movl $2, C_STATE(%r12)
    jmp parked

.balign 8
operations:
    .quad op_call, op_read, op_write, op_fill, op_copy, op_post, op_collect
operations_end:
shortest:                           # bytes of arguments that each needs
    .byte 8, 16, 8, 24, 24, 4, 8
