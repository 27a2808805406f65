# Starting the other processors, and the local APIC in both of its modes.

.set TRAMPOLINE, 0x8000             # vector 08H
.set ICR_LOW, 0x300
.set ICR_HIGH, 0x310

# Local APIC register at offset edi := esi. SDM 3A, "x2APIC Register Address Space"
apic_write:
    mov $0x1b, %ecx
    rdmsr
    bt $10, %eax
    jnc 1f
    mov %edi, %ecx
    shr $4, %ecx
    add $0x800, %ecx
    mov %esi, %eax
    xor %edx, %edx
    wrmsr
    ret
1:  bt $11, %eax
    jnc 2f
    and $0xfffff000, %eax
    mov %esi, (%rax,%rdi)
2:  ret

# rax := the local APIC register at offset edi
apic_read:
    mov $0x1b, %ecx
    rdmsr
    bt $10, %eax
    jnc 1f
    mov %edi, %ecx
    shr $4, %ecx
    add $0x800, %ecx
    rdmsr
    shl $32, %rdx
    or %rdx, %rax
    ret
1:  and $0xfffff000, %eax
    mov (%rax,%rdi), %eax
    ret

# The interrupt command esi to the APIC edi.
send_ipi:
    mov $0x1b, %ecx
    rdmsr
    bt $10, %eax
    jnc 1f
    mov $0x830, %ecx
    mov %edi, %edx
    mov %esi, %eax
    wrmsr
    ret
1:  and $0xfffff000, %eax
    shl $24, %edi
    mov %edi, ICR_HIGH(%rax)
    mov %esi, ICR_LOW(%rax)
2:  testl $0x1000, ICR_LOW(%rax)    # delivery status
    jnz 2b
    ret

# INIT-SIPI-SIPI to the APIC edi; rax := the number of processors that run
start_ap:
    push %rbx
    mov %edi, %r8d
    mov online, %ebx
    mov $trampoline, %esi
    mov $TRAMPOLINE, %edi
    mov $(trampoline_end - trampoline), %ecx
    rep movsb
    mov %r8d, %edi
    mov $0x4500, %esi               # INIT, assert
    call send_ipi
    mov $2000, %ecx
    call wait_for_ap
    mov $2, %r9d
1:  mov %r8d, %edi
    mov $(0x4600 | TRAMPOLINE >> 12), %esi
    call send_ipi
    mov $20000, %ecx
    call wait_for_ap
    ja 2f
    dec %r9d
    jnz 1b
2:  mov online, %eax
    pop %rbx
    ret

# Up to ecx rounds until more than ebx processors run.
wait_for_ap:
    cmp %ebx, online
    ja 1f
    pause
    in $0x80, %al
    dec %ecx
    jnz wait_for_ap
    cmp %ebx, online
1:  ret

.code16
trampoline:
    cli
    cld
    xor %ax, %ax
    mov %ax, %ds
    lgdtl TRAMPOLINE + trampoline_gdtr - trampoline
    mov $1, %eax
    mov %eax, %cr0
    ljmpl $CODE32, $enter_long
.balign 4
trampoline_gdtr:
    .word 9 * 8 - 1
    .long boot_gdt
trampoline_end:
.code64
