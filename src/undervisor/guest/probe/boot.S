# The probe's start: from flat 32-bit protected mode (Multiboot, PVH, the disk loader) to 64-bit mode.

.set BLOCK_SIZE, 0x20000
.set TABLES, 0x180000               # PML4, PDPT, four PDs: the first 4 GiB, identity
.set IDT, 0x186000
.set CODE64, 0x08
.set DATA, 0x10
.set CODE32, 0x18
.set TSS, 0x38

# Offsets in a processor's block
.set C_SAVED, 0x00                  # RSP to go back to after a fault
.set C_TARGET, 0x08
.set C_ACTIVE, 0x10                 # 1: a fault belongs to the operation that runs
.set C_OUTMASK, 0x14
.set C_INDEX, 0x18
.set C_APIC_ID, 0x1c
.set C_STATE, 0x20                  # mailbox: 0 idle, 1 has work, 2 done, 3 dead
.set C_REQUEST_SIZE, 0x24
.set C_RESPONSE_SIZE, 0x28
.set C_LAST, 0x2c                   # the request that C_RESPONSE answers
.set C_RESUME, 0x40                 # 256 bits: vectors that are counted instead of reported
.set C_GPRS, 0x80                   # 16 registers in encoding order, RFLAGS in RSP's place
.set C_FAULT, 0x100                 # vector, error code, RIP, CS, RSP, CR2
.set C_CURSOR, 0x140
.set C_END, 0x148
.set C_OUT, 0x150
.set C_OUT_END, 0x158
.set C_GDT, 0x180
.set C_TSS, 0x200
.set C_GDTR, 0x270
.set C_COUNTS, 0x400                # 256 counters of interrupts
.set C_SLOT, 0x1000                 # inline code
.set C_HOST_VMCB, 0x2000
.set IST1, 0x4000
.set IST2, 0x4800
.set IST3, 0x5000
.set IST4, 0x5800
.set IST5, 0x6800
.set C_STACK, 0x7fe0
.set C_HEADER, 0x7ff0               # as it came: sync, sequence | kind << 16, size, check
.set C_REQUEST, 0x8000              # and the payload behind it
.set C_RESPONSE, 0x10000

.code32
    .long 0x1badb002, 0, -0x1badb002
start:
    cli
    cld
    mov %eax, booted_by
    mov $(BLOCKS + C_STACK), %esp
    # SDM 3A, "4-Level Paging": 2 MiB pages; the device hole uncached, one page for CPL 3
    movl $(TABLES + 0x1007), TABLES
    xor %ecx, %ecx
1:  mov %ecx, %eax
    shl $12, %eax
    add $(TABLES + 0x2007), %eax
    mov %eax, TABLES + 0x1000(,%ecx,8)
    inc %ecx
    cmp $4, %ecx
    jb 1b
    xor %ecx, %ecx
2:  mov %ecx, %eax
    shl $21, %eax
    or $0x83, %eax
    cmp $0xc0000000, %eax
    jb 3f
    or $0x10, %eax
3:  mov %eax, TABLES + 0x2000(,%ecx,8)
    inc %ecx
    cmp $2048, %ecx
    jb 2b
    orl $4, TABLES + 0x2000 + (USER >> 21) * 8
    lgdt boot_gdtr
    ljmp $CODE32, $enter_long

enter_long:                         # also where an AP's trampoline arrives
    mov $DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %fs
    mov %eax, %gs
    mov %eax, %ss
    # SDM 3A, "Initializing IA-32e Mode".  PAE, OSFXSR, OSXMMEXCPT
    mov $0x620, %eax
    mov %eax, %cr4
    mov $TABLES, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx
    rdmsr
    or $0x100, %eax
    wrmsr
    mov $0x80010033, %eax           # PG, WP, NE, ET, MP, PE
    mov %eax, %cr0
    ljmp $CODE64, $long_mode

.code64
long_mode:
    mov $1, %ebx
    lock xadd %ebx, online
    cmp $MAX_CPUS, %ebx
    jae dead
    mov %ebx, %edi
    shl $17, %ebx
    add $BLOCKS, %ebx
    lea C_STACK(%rbx), %rsp
    mov %rbx, %r12
    mov %edi, C_INDEX(%r12)
    test %edi, %edi
    jnz 1f
    call make_idt
1:  call set_up_processor
    cmpl $0, C_INDEX(%r12)
    jne parked
    mov $0xff, %al                  # both 8259 masked
    out %al, $0x21
    out %al, $0xa1
    call serial_start
    jmp serve

dead:
    cli
    hlt
    jmp dead

# Descriptor tables, TSS and local APIC of the processor with block r12.
set_up_processor:
    mov $boot_gdt, %esi
    lea C_GDT(%r12), %rdi
    mov $9, %ecx
    rep movsq
    lea C_TSS(%r12), %rax
    mov %rax, %rdx
    shl $16, %rdx                   # base 15:0 at bit 16; the rest above bit 40
    mov %edx, %edx
    movabs $0x0000890000000067, %rcx
    or %rcx, %rdx
    mov %rax, %rcx
    shr $16, %rcx
    movzbl %cl, %r8d
    shl $32, %r8
    or %r8, %rdx
    shr $8, %rcx
    movzbl %cl, %r8d
    shl $56, %r8
    or %r8, %rdx
    mov %rdx, C_GDT + TSS(%r12)
    movq $0, C_GDT + TSS + 8(%r12)
    .irp number, 1, 2, 3, 4, 5
    lea IST\number(%r12), %rax
    mov %rax, C_TSS + 0x24 + 8 * (\number - 1)(%r12)
    .endr
    movw $104, C_TSS + 0x66(%r12)
    movw $(9 * 8 - 1), C_GDTR(%r12)
    lea C_GDT(%r12), %rax
    mov %rax, C_GDTR + 2(%r12)
    lgdt C_GDTR(%r12)
    mov $TSS, %eax
    ltr %ax
    lidt idtr
    movq $~0, C_RESUME + 8(%r12)    # interrupts, and NMI, are counted
    movq $~0, C_RESUME + 16(%r12)
    movq $~0, C_RESUME + 24(%r12)
    movabs $0xffffffff00000004, %rax
    mov %rax, C_RESUME(%r12)
    mov $1, %eax
    cpuid
    shr $24, %ebx
    mov %ebx, C_APIC_ID(%r12)
    bt $9, %edx
    jnc 1f
    mov $0xf0, %edi                 # spurious-interrupt vector register: enabled, vector FFH
    mov $0x1ff, %esi
    call apic_write
1:  ret

make_idt:
    mov $IDT, %edi
    mov $stubs, %eax
    xor %ecx, %ecx
1:  mov %eax, %edx
    movw %dx, (%rdi)
    movw $CODE64, 2(%rdi)
    mov $5, %bl                     # IST: interrupts 5, faults 1; NMI, #DF, #MC their own
    cmp $32, %ecx
    jae 2f
    mov $1, %bl
    cmp $2, %ecx
    je 3f
    cmp $8, %ecx
    je 4f
    cmp $18, %ecx
    jne 2f
    inc %bl
4:  inc %bl
3:  inc %bl
2:  mov %bl, 4(%rdi)
    movb $0x8e, 5(%rdi)
    shr $16, %edx
    mov %edx, 6(%rdi)
    movl $0, 10(%rdi)
    movw $0, 14(%rdi)
    add $16, %edi
    add $16, %eax
    inc %ecx
    cmp $256, %ecx
    jb 1b
    movb $0xee, IDT + 3 * 16 + 5    # INT3 from CPL 3
    ret

.balign 16
boot_gdt:
    .quad 0
    .quad 0x00af9b000000ffff        # 08 64-bit code
    .quad 0x00cf93000000ffff        # 10 data
    .quad 0x00cf9b000000ffff        # 18 32-bit code
    .quad 0x00affb000000ffff        # 20 64-bit code, DPL 3
    .quad 0x00cff3000000ffff        # 28 data, DPL 3
    .quad 0x00cffb000000ffff        # 30 32-bit code, DPL 3
    .quad 0, 0                      # 38 TSS
boot_gdtr:
    .word 9 * 8 - 1
    .quad boot_gdt
idtr:
    .word 256 * 16 - 1
    .quad IDT
.balign 4
online:    .long 0
booted_by: .long 0
