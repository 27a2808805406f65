/* From Multiboot's 32-bit protected mode to 64-bit C, on the processor that firmware started. */

#define MULTIBOOT_MAGIC 0x1badb002
#define MULTIBOOT_FLAGS 3               /* modules on page boundaries, memory sizes wanted */

    .section .multiboot, "a"
    .align 4
    .long MULTIBOOT_MAGIC, MULTIBOOT_FLAGS, -(MULTIBOOT_MAGIC + MULTIBOOT_FLAGS)

    .text
    .code32
    .globl start
start:
    cli
    cld
    movl    $(boot_stack + 0x4000), %esp
    movl    %eax, %ebp                  /* the loader's magic number */
    movl    %ebx, %esi                  /* its information structure */

    movl    $0x80000000, %eax           /* is there a long mode at all? */
    cpuid
    cmpl    $0x80000001, %eax
    jb      no_long_mode
    movl    $0x80000001, %eax
    cpuid
    btl     $29, %edx
    jnc     no_long_mode

    /* 4 GiB one to one, in 2 MiB pages: four page directories in a row. */
    movl    $page_directories, %edi
    movl    $0x83, %eax                 /* present, writable, large */
    movl    $2048, %ecx
1:  movl    %eax, (%edi)
    movl    $0, 4(%edi)
    addl    $0x200000, %eax
    addl    $8, %edi
    loop    1b

    movl    $(page_directories + 3), %eax
    movl    $page_directory_pointers, %edi
    movl    $4, %ecx
1:  movl    %eax, (%edi)
    addl    $0x1000, %eax
    addl    $8, %edi
    loop    1b
    movl    $(page_directory_pointers + 3), page_map

    movl    %cr4, %eax
    orl     $0x20, %eax                 /* PAE */
    movl    %eax, %cr4
    movl    $page_map, %eax
    movl    %eax, %cr3
    movl    $0xc0000080, %ecx           /* EFER.LME */
    rdmsr
    orl     $0x100, %eax
    wrmsr
    movl    $0x80010033, %eax           /* PG, WP, NE, ET, MP, PE */
    movl    %eax, %cr0
    lgdt    boot_gdt_register
    ljmp    $0x08, $long_mode

no_long_mode:
    movl    $0xf4, %edx                 /* nothing can be printed yet; end with value 2 */
    movl    $2, %eax
    outl    %eax, %dx
1:  hlt
    jmp     1b

    .code64
long_mode:
    movl    $0x10, %eax
    movl    %eax, %ds
    movl    %eax, %es
    movl    %eax, %ss
    xorl    %eax, %eax
    movl    %eax, %fs
    movl    %eax, %gs
    movl    %ebp, %edi                  /* upper halves cleared */
    movl    %esi, %esi
    xorl    %ebp, %ebp
    call    main
    ud2

    .section .rodata
    .align 8
boot_gdt:
    .quad   0
    .quad   0x00af9b000000ffff          /* 64-bit code */
    .quad   0x00cf93000000ffff          /* data */
boot_gdt_register:
    .word   . - boot_gdt - 1
    .long   boot_gdt

    .bss
    .align 4096
page_map:                   .skip 0x1000
page_directory_pointers:    .skip 0x1000
page_directories:           .skip 0x4000
boot_stack:                 .skip 0x4000

    .section .note.GNU-stack, "", @progbits
