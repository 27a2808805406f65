# A small L1 that does one thing again and again and prints a newline before and after each round.
# VENDOR (1 VMX, 2 SVM, 0 none), ROUNDS and COUNT, and the addresses of the tables are constants.

    .set FLAGS, 3
    .code32
header:
    .long 0x1badb002, FLAGS, -(0x1badb002 + FLAGS)
    .globl start
start:
    cli
    mov $0xff, %al                      # the PIC's lines masked: no timer in what is measured
    out %al, $0x21
    out %al, $0xa1
    mov $STACK, %esp
    mov $PAGES, %edi                    # one GiB one to one: PML4, PDPT, PD
    mov $(PAGES + 0x1003), %eax
    mov %eax, (%edi)
    mov $(PAGES + 0x2003), %eax
    mov %eax, 0x1000(%edi)
    add $0x2000, %edi
    mov $0x83, %eax
    mov $512, %ecx
1:  mov %eax, (%edi)
    add $0x200000, %eax
    add $8, %edi
    loop 1b
    mov $NESTED, %edi                   # and the same for L2
    mov $(NESTED + 0x1007), %eax
    mov %eax, (%edi)
    mov $(NESTED + 0x2007), %eax
    mov %eax, 0x1000(%edi)
    add $0x2000, %edi
    mov $NESTED_LEAF, %eax
    mov $512, %ecx
1:  mov %eax, (%edi)
    add $0x200000, %eax
    add $8, %edi
    loop 1b
    mov %cr4, %eax
    or $0x620, %eax                     # PAE, OSFXSR, OSXMMEXCPT
    mov %eax, %cr4
    mov $PAGES, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx
    rdmsr
    or $EFER_BITS, %eax
    wrmsr
    mov $0x80000033, %eax
    mov %eax, %cr0
    lgdt gdtr
    ljmp $8, $long
    .balign 8
gdt: .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x0000890000000067 | (TSS & 0xffffff) << 16, 0
gdtr: .word . - gdt - 1
    .long gdt

    .code64
long:
    mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $0x18, %eax
    ltr %ax
    mov $ROUNDS, %r14
    mov $COUNT, %r15
    mov $VENDOR, %eax
    cmp $1, %eax
    je vmx
    cmp $2, %eax
    je svm
    jmp l2                              # no hypervisor: the guest's code is L1

# -- VMX -----------------------------------------------------------------------------------------
vmx:
    mov %cr4, %rax
    or $0x2000, %rax
    mov %rax, %cr4
    mov $0x480, %ecx
    rdmsr
    mov %eax, VMXON_REGION
    mov %eax, VMCS_REGION
    vmxon vmxon_pointer
    vmclear vmcs_pointer
    vmptrld vmcs_pointer
    mov $FIELDS, %rsi
    mov $FIELD_COUNT, %ecx
1:  mov (%rsi), %rax
    mov 8(%rsi), %rbx
    vmwrite %rbx, %rax
    add $16, %rsi
    loop 1b
    mov $0x6c16, %eax                   # host RIP
    mov $vmx_exit, %ebx
    vmwrite %rbx, %rax
    mov $0x6c14, %eax                   # host RSP
    mov $STACK, %ebx
    vmwrite %rbx, %rax
    mov $0x681e, %eax                   # guest RIP
    mov $l2, %ebx
    vmwrite %rbx, %rax
    vmlaunch
failed:
    mov $0x4400, %eax                   # VM-instruction error
    vmread %rax, %rax
    add $0x20, %eax
    jmp end
vmx_exit:
    mov $0x4402, %edx                   # exit reason
    vmread %rdx, %rax
    cmp $10, %eax                       # CPUID
    jne 1f
    mov $0x681e, %edx
    vmread %rdx, %rax
    add $2, %rax
    vmwrite %rax, %rdx
    vmresume
    jmp failed
1:  cmp $18, %eax                       # VMCALL: L2 has finished
    jne end
    xor %eax, %eax
    jmp end
vmxon_pointer: .quad VMXON_REGION
vmcs_pointer: .quad VMCS_REGION

# -- SVM -----------------------------------------------------------------------------------------
svm:
    mov $0xc0010117, %ecx               # VM_HSAVE_PA
    mov $VMXON_REGION, %eax
    xor %edx, %edx
    wrmsr
    movq $l2, VMCS_REGION + 0x578       # RIP
    mov $VMCS_REGION, %eax
1:  vmrun
    cmpl $0x81, VMCS_REGION + 0x70      # VMMCALL
    jne 2f
    addq $3, VMCS_REGION + 0x578
    jmp 1b
2:  mov VMCS_REGION + 0x70, %eax
    cmp $0x78, %eax                     # HLT: L2 has finished
    jne end
    xor %eax, %eax

end:
    mov $0xf4, %edx
    out %eax, %dx
1:  hlt
    jmp 1b

# -- the guest -----------------------------------------------------------------------------------
l2:
    mov $0x3f8, %edx
    mov $10, %al
    out %al, %dx
round:
    BODY
    mov $0x3f8, %edx
    mov $10, %al
    out %al, %dx
    dec %r14
    jnz round
    FINISH
    xor %eax, %eax
    jmp end
    .balign 4096
