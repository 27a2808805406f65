# A Linux program without a library: what CPUID says of who is below, and what CPUID costs.
# Prints numbers of 16 hexadecimal digits, one a line: EAX, EBX, ECX, EDX of each leaf, then
# SAMPLES times the ticks of one CPUID, then SAMPLES times those of a plain instruction.
    .set SYS_WRITE, 1
    .set SYS_EXIT, 60
    .set STDOUT, 1
    .set LINE, 17

start:
    lea text(%rip), %rdi
    lea leaves(%rip), %r12
next_leaf:
    mov (%r12), %eax
    xor %ecx, %ecx
    cpuid
    mov %edx, %r15d
    mov %ecx, %r14d
    mov %ebx, %r13d
    call put
    mov %r13, %rax
    call put
    mov %r14, %rax
    call put
    mov %r15, %rax
    call put
    add $4, %r12
    lea leaves_end(%rip), %rax
    cmp %rax, %r12
    jne next_leaf

    mov $SAMPLES, %r12
time_cpuid:
    call now
    mov %rax, %r13
    xor %eax, %eax
    xor %ecx, %ecx
    cpuid
    call now
    sub %r13, %rax
    call put
    dec %r12
    jnz time_cpuid

    mov $SAMPLES, %r12
time_plain:
    call now
    mov %rax, %r13
    xor %eax, %eax
    xor %ecx, %ecx
    lfence
    call now
    sub %r13, %rax
    call put
    dec %r12
    jnz time_plain

    lea text(%rip), %rsi
    mov %rdi, %r12
write:                          # a pipe may take it in parts
    mov %r12, %rdx
    sub %rsi, %rdx
    jz done
    mov $STDOUT, %edi
    mov $SYS_WRITE, %eax
    syscall
    test %rax, %rax
    jle failed
    add %rax, %rsi
    jmp write
failed:
    mov $1, %edi
    jmp exit
done:
    xor %edi, %edi
exit:
    mov $SYS_EXIT, %eax
    syscall

now:                            # RAX: the time-stamp counter
    lfence
    rdtsc
    shl $32, %rdx
    or %rdx, %rax
    ret

put:                            # RAX as a line of text at RDI, which it moves on
    mov $16, %ecx
digit:
    rol $4, %rax
    mov %eax, %edx
    and $15, %edx
    lea digits(%rip), %rbx
    mov (%rbx, %rdx), %dl
    mov %dl, (%rdi)
    inc %rdi
    dec %ecx
    jnz digit
    movb $10, (%rdi)
    inc %rdi
    ret

digits:
    .ascii "0123456789abcdef"
    .balign 4
leaves:
    .long 1, 0x40000000, 0x40000001
leaves_end:
text:
