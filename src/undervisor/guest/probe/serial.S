# Frames over COM1 at 3F8H, polled.  Header: sync, sequence | kind << 16, length, check of both;
# then the payload and its Adler-32.  A request is filled up to a multiple of BURST bytes.

.set COM1, 0x3f8
.set IN_FRAME_POLLS, 1000000        # a frame that stops half way is given up

serial_start:
    .macro serial_set register, value
    mov $(COM1 + \register), %dx
    mov $\value, %al
    out %al, %dx
    .endm
    serial_set 1, 0                 # no interrupts
    serial_set 3, 0x80
    serial_set 0, 1                 # 115200
    serial_set 1, 0
    serial_set 3, 3                 # 8N1
    # Whether the receiver tells that its trigger level is reached, tried in loopback: only a true
    # 16550A does, and then BURST bytes can be taken at once.
    serial_set 4, 0x13
    serial_set 1, 1                 # received data: for the identification, nobody listens
    serial_set 2, 0xc7              # FIFOs on and empty, trigger level 14
    mov $(BURST - 1), %ebx
    call echo
    call burst_ready
    je 1f
    mov $1, %ebx
    call echo
    call burst_ready
    jne 1f
    mov $COM1, %dx                  # one byte less: some forget to take it back
    in %dx, %al
    call burst_ready
    je 1f
    movb $1, in_bursts
    jmp 2f
1:  serial_set 1, 0
2:  serial_set 2, 0xc7
    serial_set 4, 3                 # DTR, RTS
    ret

echo:                               # ebx bytes to ourselves
    mov $COM1, %dx
    mov $0x55, %al
    out %al, %dx
    mov $10000, %ecx
1:  mov $(COM1 + 5), %dx
    in %dx, %al
    test $0x40, %al
    jnz 2f
    dec %ecx
    jnz 1b
2:  dec %ebx
    jnz echo
    ret

burst_ready:                        # ZF where at least BURST bytes are there
    mov $(COM1 + 2), %dx
    in %dx, %al
    and $0x0f, %al
    cmp $4, %al
    ret

# Waits for a byte; CF where r9d polls brought none (r9d = 0: wait for ever).
wait_byte:
    mov %r9d, %r10d
1:  mov $(COM1 + 5), %dx
    in %dx, %al
    test $1, %al                    # clears CF
    jnz 2f
    pause
    dec %r10d
    jnz 1b
    test %r9d, %r9d
    jz 1b
    stc
2:  ret

# A byte to rdi; CF as above.
get_byte:
    call wait_byte
    jc 1f
    mov $COM1, %dx
    in %dx, %al
    stosb                           # CF as it is
1:  ret

# ecx bytes to rdi; CF as above.
get_bytes:
    jrcxz 5f
1:  cmp $BURST, %ecx
    jb 3f
    cmpb $0, in_bursts
    je 3f
    call burst_ready
    je 2f
    call wait_byte
    jc 4f
    call burst_ready
    jne 3f
2:  sub $BURST, %ecx
    push %rcx
    mov $COM1, %dx
    mov $BURST, %ecx
    rep insb
    pop %rcx
    jmp get_bytes
3:  call get_byte
    jc 4f
    dec %ecx
    jnz 1b
5:  clc
4:  ret

# ecx bytes from rsi; the transmitter takes 16 when it is empty.
put_bytes:
    mov %ecx, %r10d
1:  test %r10d, %r10d
    jz 4f
2:  mov $(COM1 + 5), %dx
    in %dx, %al
    test $0x20, %al
    jz 2b
    mov $16, %ecx
    cmp %ecx, %r10d
    cmovb %r10d, %ecx
    sub %ecx, %r10d
    mov $COM1, %dx
    rep outsb
    jmp 1b
4:  ret

# Adler-32 of rcx bytes at rsi, in eax. RFC 1950.
adler:
    mov $1, %eax
    xor %edx, %edx
    jrcxz 2f
1:  movzbl (%rsi), %r8d
    inc %rsi
    add %r8d, %eax
    lea -65521(%rax), %r8d
    cmp $65521, %eax
    cmovae %r8d, %eax
    add %eax, %edx
    lea -65521(%rdx), %r8d
    cmp $65521, %edx
    cmovae %r8d, %edx
    dec %rcx
    jnz 1b
2:  shl $16, %edx
    or %edx, %eax
    ret

# Kind eax, the sequence of the last request, ecx bytes at rsi.
send_frame:
    push %rsi
    push %rcx
    shl $16, %eax
    movzwl C_HEADER + 4(%r12), %edx
    or %edx, %eax
    mov %eax, frame + 4
    mov %ecx, frame + 8
    rol $7, %ecx
    xor %ecx, %eax
    not %eax
    mov %eax, frame + 12
    movl $SYNC, frame
    mov $frame, %esi
    mov $16, %ecx
    call put_bytes
    mov (%rsp), %rcx
    mov 8(%rsp), %rsi
    call adler
    mov %eax, frame
    pop %rcx
    pop %rsi
    call put_bytes
    mov $frame, %esi
    mov $4, %ecx
    jmp put_bytes

# For ever: a request, its answer.
serve:
    movl $~0, C_LAST(%r12)
    mov $hello, %esi
    mov booted_by, %eax
    mov %eax, hello + 4
    mov $8, %ecx
    mov $KIND_HELLO, %eax
    call send_frame
next_request:
    lea C_STACK(%r12), %rsp
    xor %r9d, %r9d
    call wait_byte
    mov $IN_FRAME_POLLS, %r9d
    lea C_HEADER(%r12), %rdi
    mov $BURST, %ecx
    call get_bytes
    jc nak
1:  cmpl $SYNC, C_HEADER(%r12)
    je 2f
    lea C_HEADER(%r12), %rdi        # not at the beginning of a frame: one byte on
    lea 1(%rdi), %rsi
    mov $(BURST - 1), %ecx
    rep movsb
    call get_byte
    jc nak
    jmp 1b
2:  mov $BURST, %ecx                # the rest of the header is there then
    call get_bytes
    jc nak
    mov C_HEADER + 4(%r12), %eax
    mov C_HEADER + 8(%r12), %ecx
    mov %ecx, %edx
    rol $7, %edx
    xor %edx, %eax
    not %eax
    cmp %eax, C_HEADER + 12(%r12)
    jne nak
    cmp $REQUEST_MOST, %ecx
    ja nak
    lea (16 + 4 + BURST - 1)(%rcx), %eax
    xor %edx, %edx
    mov $BURST, %ecx
    div %ecx
    mul %ecx
    mov %eax, %ecx
    sub $(2 * BURST), %ecx
    jbe 3f
    call get_bytes
    jc nak
3:  lea C_REQUEST(%r12), %rsi
    mov C_HEADER + 8(%r12), %ecx
    call adler
    cmp %eax, (%rsi)
    jne nak
    movzwl C_HEADER + 4(%r12), %eax
    cmp C_LAST(%r12), %eax          # asked again: the answer was lost, not the request
    je 2f
    mov %eax, C_LAST(%r12)
    mov C_HEADER + 8(%r12), %ecx
    call interpret
2:  lea C_RESPONSE(%r12), %rsi
    mov C_RESPONSE_SIZE(%r12), %ecx
    mov $KIND_RESPONSE, %eax
    call send_frame
    jmp next_request
nak:
    xor %ecx, %ecx
    mov $KIND_NAK, %eax
    call send_frame
    jmp next_request

.balign 8
frame:  .quad 0, 0
hello:  .long BUILD, 0
in_bursts: .byte 0
