# One routine per instruction: registers in, registers and RFLAGS out.  A client calls them by name.

.macro routine name, code:vararg
do_\name:
    \code
    ret
.endm

routine nothing, nop
routine cpuid, cpuid
routine rdmsr, rdmsr
routine wrmsr, wrmsr
routine xgetbv, xgetbv
routine xsetbv, xsetbv
routine rdtsc, rdtsc
routine rdtscp, rdtscp
routine rdpmc, rdpmc
routine wbinvd, wbinvd
routine invlpg, invlpg (%rdi)
.irp number, 0, 2, 3, 4, 8
routine read_cr\number, mov %cr\number, %rax
routine write_cr\number, mov %rax, %cr\number
.endr
.irp number, 0, 1, 2, 3, 6, 7
routine read_dr\number, mov %db\number, %rax
routine write_dr\number, mov %rax, %db\number
.endr
routine in8, in %dx, %al
routine in16, in %dx, %ax
routine in32, in %dx, %eax
routine out8, out %al, %dx
routine out16, out %ax, %dx
routine out32, out %eax, %dx
routine peek8, movzbl (%rdi), %eax
routine peek16, movzwl (%rdi), %eax
routine peek32, mov (%rdi), %eax
routine peek64, mov (%rdi), %rax
routine poke8, mov %al, (%rdi)
routine poke16, mov %ax, (%rdi)
routine poke32, mov %eax, (%rdi)
routine poke64, mov %rax, (%rdi)
do_window:                          # a moment with interrupts enabled
    sti
    nop
    cli
    ret
do_wait:                            # until an interrupt
    sti
    hlt
    cli
    ret
do_invpcid:                         # type rdi, PCID rsi, address rdx
    push %rdx
    push %rsi
    invpcid (%rsp), %rdi
    lea 16(%rsp), %rsp
    ret
do_start_ap: jmp start_ap
do_send_ipi: jmp send_ipi
do_apic_read: jmp apic_read
do_apic_write: jmp apic_write

# SVM
routine vmrun, vmrun %rax
routine vmload, vmload %rax
routine vmsave, vmsave %rax
routine vmmcall, vmmcall
routine stgi, stgi
routine clgi, clgi
routine skinit, skinit %eax
routine invlpga, invlpga %rax, %ecx
do_svm_run:                         # VMCB rax, all registers; the rest of the host's state is kept
    push %rax
    mov %rsp, %rax
    and $-BLOCK_SIZE, %rax
    add $C_HOST_VMCB, %rax
    vmsave %rax
    mov (%rsp), %rax
    vmload %rax
    vmrun %rax
    vmsave %rax
    mov %rsp, %rax
    and $-BLOCK_SIZE, %rax
    add $C_HOST_VMCB, %rax
    vmload %rax
    pop %rax
    stgi
    ret

# VMX.  r10: the VM-instruction error where ZF says that there is one
vmx_outcome:
    jnz 1f
    pushfq
    mov $0x4400, %r10d
    vmread %r10, %r10
    popfq
1:  ret
.macro vmx_routine name, code:vararg
do_\name:
    \code
    jmp vmx_outcome
.endm
.irp name, vmxon, vmclear, vmptrld
do_\name:                           # the address rdi
    push %rdi
    \name (%rsp)
    lea 8(%rsp), %rsp
    jmp vmx_outcome
.endr
do_vmptrst:
    push $0
    vmptrst (%rsp)
    pop %rax
    jmp vmx_outcome
vmx_routine vmread, vmread %rdi, %rax
vmx_routine vmwrite, vmwrite %rsi, %rdi
vmx_routine vmxoff, vmxoff
vmx_routine vmlaunch, vmlaunch
vmx_routine vmresume, vmresume
routine vmcall, vmcall
routine vmfunc, vmfunc
do_invept:                          # type rdi, EPTP rsi
    push $0
    push %rsi
    invept (%rsp), %rdi
    lea 16(%rsp), %rsp
    jmp vmx_outcome
do_invvpid:                         # type rdi, VPID rsi, linear address rdx
    push %rdx
    push %rsi
    invvpid (%rsp), %rdi
    lea 16(%rsp), %rsp
    jmp vmx_outcome
.irp name, vmlaunch, vmresume
do_\name\()_run:                    # all registers; both flags clear: L2 ran and exited
    push %rax
    push %rdx
    lea 16(%rsp), %rdx
    mov $0x6c14, %eax               # host RSP
    vmwrite %rdx, %rax
    lea vmx_exited(%rip), %rdx
    mov $0x6c16, %eax               # host RIP
    vmwrite %rdx, %rax
    pop %rdx
    pop %rax
    \name
    jmp vmx_outcome
.endr
vmx_exited:
    ret
do_vmwrites:                        # rcx rows of field (4) and value (8) at rsi; rcx := rows left
    jrcxz 2f
1:  mov (%rsi), %edi
    mov 4(%rsi), %rax
    vmwrite %rax, %rdi
    jbe vmx_outcome
    add $12, %rsi
    dec %rcx
    jnz 1b
2:  test %rsp, %rsp                 # CF and ZF clear: all succeeded
    ret
do_vmreads:                         # rcx fields (4) at rsi; value and flags (8, 1) of each to rdi
    jrcxz 2f
1:  mov (%rsi), %edx
    xor %eax, %eax
    vmread %rdx, %rax
    pushfq
    stosq
    pop %rax
    stosb
    add $4, %rsi
    dec %rcx
    jnz 1b
2:  ret
image_end:
