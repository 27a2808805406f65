# A Linux program without a library that measures what a level costs: the same bytes everywhere.
#
#   program MASK SAMPLES NANOSECONDS PATH BYTES        numbers are hexadecimal
#
# MASK names the measures by their places in the table below.  Each one is repeated until a sample
# takes NANOSECONDS, then that often SAMPLES times.  PATH is a file or block device of BYTES bytes
# for the disk's measures; a writing one overwrites it.
#
# Lines of numbers of 16 hexadecimal digits: first CPUID.1:ECX and CPUID.40000000H:EBX, ECX, EDX;
# then a line for each sample: the measure's place, iterations, nanoseconds (or the place, 0 and the
# error number of what failed); last the nanoseconds that all took.
    .set SYS_READ, 0
    .set SYS_WRITE, 1
    .set SYS_OPEN, 2
    .set SYS_CLOSE, 3
    .set SYS_MMAP, 9
    .set SYS_PREAD64, 17
    .set SYS_PWRITE64, 18
    .set SYS_MADVISE, 28
    .set SYS_SOCKET, 41
    .set SYS_CONNECT, 42
    .set SYS_ACCEPT, 43
    .set SYS_BIND, 49
    .set SYS_LISTEN, 50
    .set SYS_GETSOCKNAME, 51
    .set SYS_SETSOCKOPT, 54
    .set SYS_FORK, 57
    .set SYS_EXIT, 60
    .set SYS_WAIT4, 61
    .set SYS_KILL, 62
    .set SYS_GETPPID, 110
    .set SYS_PRCTL, 157
    .set SYS_SCHED_SETAFFINITY, 203
    .set SYS_CLOCK_GETTIME, 228
    .set SYS_PIPE2, 293
    .set SYS_GETCPU, 309

    .set STDOUT, 1
    .set CLOCK_MONOTONIC, 1
    .set PROT_READ_WRITE, 3
    .set MAP_PRIVATE_ANONYMOUS, 0x22
    .set MADV_DONTNEED, 4
    .set MADV_NOHUGEPAGE, 15
    .set O_RDONLY_DIRECT, 0x4000
    .set O_WRONLY_DIRECT_DSYNC, 0x5001
    .set AF_INET, 2
    .set SOCK_STREAM, 1
    .set IPPROTO_TCP, 6
    .set TCP_NODELAY, 1
    .set PR_SET_PDEATHSIG, 1
    .set SIGKILL, 9
    .set EIO, 5

    .set PAGE, 4096
    .set CACHE_LINE, 64
    .set CPU_BYTES, 128             # of an affinity mask
    .set FAULTED, 1 << 20           # bytes whose pages are taken one by one

    .macro CALL_LINUX number
    mov $\number, %eax
    syscall
    .endm

    .macro OR_FAIL                  # leave the function with the error that is in RAX
    test %rax, %rax
    js return
    .endm

# R12: the measure's place; R13: its row; RBP: iterations of a sample; R14: samples left.
# Everything else belongs to the functions of a measure.
start:
    cmpq $6, (%rsp)
    jne misused
    lea arguments(%rip), %rdi
    mov 16(%rsp), %rsi
    call number
    mov %rax, mask - arguments(%rdi)
    mov 24(%rsp), %rsi
    call number
    mov %rax, samples - arguments(%rdi)
    mov 32(%rsp), %rsi
    call number
    mov %rax, least - arguments(%rdi)
    mov 40(%rsp), %rsi
    mov %rsi, path - arguments(%rdi)
    mov 48(%rsp), %rsi
    call number
    shr $12, %rax
    mov %rax, disk_pages - arguments(%rdi)

    call stay_on_this_processor
    xor %edi, %edi
    mov $2 * BUFFER, %esi
    mov $PROT_READ_WRITE, %edx
    mov $MAP_PRIVATE_ANONYMOUS, %r10d
    mov $-1, %r8
    xor %r9d, %r9d
    CALL_LINUX SYS_MMAP
    test %rax, %rax
    js misused
    mov %rax, buffer(%rip)
    mov %rax, %rdi                  # pages of 4 KiB at every level
    mov $2 * BUFFER, %esi
    mov $MADV_NOHUGEPAGE, %edx
    CALL_LINUX SYS_MADVISE          # a kernel without huge pages refuses, rightly

    mov $1, %eax
    cpuid
    mov %ecx, %eax
    call put
    mov $0x40000000, %eax
    cpuid
    mov %ecx, %r8d
    mov %edx, %r9d
    mov %ebx, %eax
    call put
    mov %r8d, %eax
    call put
    mov %r9d, %eax
    call put
    call end_line
    call now
    mov %rax, began(%rip)

    xor %r12d, %r12d
    lea measures(%rip), %r13
next_measure:
    bt %r12, mask(%rip)
    jnc skip_measure
    call measure
    call flush
skip_measure:
    inc %r12
    add $32, %r13
    lea measures_end(%rip), %rax
    cmp %rax, %r13
    jb next_measure

    call now
    sub began(%rip), %rax
    call put
    call end_line
    call flush
    xor %edi, %edi
    jmp exit
misused:
    mov $2, %edi
exit:
    CALL_LINUX SYS_EXIT

measure:
    call *(%r13)
    test %rax, %rax
    js measure_failed
    mov $1, %ebp
calibrate:
    call sample
    test %rax, %rax
    js measure_failed
    cmp least(%rip), %rax
    jae calibrated
    shl $1, %rbp
    jmp calibrate
calibrated:
    mov samples(%rip), %r14
next_sample:
    call sample
    test %rax, %rax
    js measure_failed
    mov %rax, %rbx
    mov %r12, %rax
    call put
    mov %rbp, %rax
    call put
    mov %rbx, %rax
    call put
    call end_line
    dec %r14
    jnz next_sample
measure_ended:
    call *16(%r13)
    mov buffer(%rip), %rdi
    mov $2 * BUFFER, %esi
    mov $MADV_DONTNEED, %edx
    CALL_LINUX SYS_MADVISE
    ret
measure_failed:
    mov %rax, %rbx
    neg %rbx
    mov %r12, %rax
    call put
    xor %eax, %eax
    call put
    mov %rbx, %rax
    call put
    call end_line
    jmp measure_ended

sample:                             # RAX: nanoseconds of RBP iterations, or what failed
    call now
    push %rax
    mov %rbp, %rdi
    call *8(%r13)
    test %rax, %rax
    js sample_failed
    call now
    sub (%rsp), %rax
sample_failed:
    pop %rcx
    ret

nothing:
done:
    xor %eax, %eax
return:
    ret

# -- the processor ---------------------------------------------------------------------------------

integer:                            # multiply, shift, xor: each needs the one before
    mov $1, %eax
    movabs $0x9e3779b97f4a7c15, %rdx
1:  imul %rdx, %rax
    mov %rax, %rcx
    shr $29, %rcx
    xor %rcx, %rax
    dec %rdi
    jnz 1b
    jmp done

exiting:
1:  xor %eax, %eax
    xor %ecx, %ecx
    cpuid
    dec %rdi
    jnz 1b
    jmp done

# -- memory ----------------------------------------------------------------------------------------

fill:                               # every page gets a frame of its own
    mov buffer(%rip), %rdi
    mov %rdi, cursor(%rip)
    mov $2 * BUFFER / 8, %ecx
    mov $1, %eax
    rep stosq
    jmp done

read_memory:                        # an iteration is a block
    mov cursor(%rip), %rsi
1:  mov $BLOCK / 64, %ecx
2:  add (%rsi), %rax
    add 8(%rsi), %rdx
    add 16(%rsi), %r8
    add 24(%rsi), %r9
    add 32(%rsi), %rax
    add 40(%rsi), %rdx
    add 48(%rsi), %r8
    add 56(%rsi), %r9
    add $64, %rsi
    dec %ecx
    jnz 2b
    call wrap
    dec %rdi
    jnz 1b
    mov %rsi, cursor(%rip)
    jmp done

copy_memory:                        # a block from one half of the buffer to the other
    mov %rdi, %rbx
    mov cursor(%rip), %rsi
1:  lea BUFFER(%rsi), %rdi
    mov $BLOCK / 8, %ecx
    rep movsq
    call wrap
    dec %rbx
    jnz 1b
    mov %rsi, cursor(%rip)
    jmp done

wrap:                               # RSI: the next block of the first half
    lea -BUFFER(%rsi), %r10
    cmp buffer(%rip), %r10
    jb 1f
    mov %r10, %rsi
1:  ret

scatter:                            # one cycle through all cache lines, in random order (Sattolo)
    mov 24(%r13), %r8
    shr $6, %r8
    mov buffer(%rip), %r9
    mov %r9, cursor(%rip)
    xor %ecx, %ecx
    mov %r9, %rax
1:  mov %rax, (%rax)
    add $CACHE_LINE, %rax
    inc %rcx
    cmp %r8, %rcx
    jb 1b
2:  dec %r8
    jz done
    call random
    xor %edx, %edx
    div %r8
    shl $6, %rdx
    mov %r8, %rcx
    shl $6, %rcx
    mov (%r9,%rdx), %rax
    xchg %rax, (%r9,%rcx)
    mov %rax, (%r9,%rdx)
    jmp 2b

chase:
    mov cursor(%rip), %rax
1:  mov (%rax), %rax
    dec %rdi
    jnz 1b
    mov %rax, cursor(%rip)
    jmp done

untouched:
    mov buffer(%rip), %rdi
    mov %rdi, cursor(%rip)
    jmp done

fault:                              # a page that has no frame yet
    mov %rdi, %rbx
1:  mov cursor(%rip), %rsi
    movb $1, (%rsi)
    add $PAGE, %rsi
    mov buffer(%rip), %rdi
    lea FAULTED(%rdi), %rax
    cmp %rax, %rsi
    jb 2f
    mov $FAULTED, %esi
    mov $MADV_DONTNEED, %edx
    CALL_LINUX SYS_MADVISE
    OR_FAIL
    mov buffer(%rip), %rsi
2:  mov %rsi, cursor(%rip)
    dec %rbx
    jnz 1b
    jmp done

# -- the kernel ------------------------------------------------------------------------------------

system_call:
1:  CALL_LINUX SYS_GETPPID
    dec %rdi
    jnz 1b
    jmp done

process:                            # fork, exit, wait
    mov %rdi, %rbx
1:  CALL_LINUX SYS_FORK
    OR_FAIL
    jz child_exits
    mov %rax, %rdi
    xor %esi, %esi
    xor %edx, %edx
    xor %r10d, %r10d
    CALL_LINUX SYS_WAIT4
    OR_FAIL
    dec %rbx
    jnz 1b
    jmp done
child_exits:
    xor %edi, %edi
    jmp exit

# -- two processes ---------------------------------------------------------------------------------

# `unit` bytes go to a child, one byte comes back.  Both are on one processor.
exchange:
    mov %rdi, %rbx
1:  mov unit(%rip), %r8
2:  mov parent_out(%rip), %edi
    mov buffer(%rip), %rsi
    mov %r8, %rdx
    CALL_LINUX SYS_WRITE
    OR_FAIL
    sub %rax, %r8
    jnz 2b
    mov parent_in(%rip), %edi
    mov $1, %edx
    CALL_LINUX SYS_READ
    cmp $1, %rax
    jne short
    dec %rbx
    jnz 1b
    jmp done
short:
    OR_FAIL
    mov $-EIO, %rax
    ret

answer:                             # the child's side; its parent ends it
    mov $PR_SET_PDEATHSIG, %edi
    mov $SIGKILL, %esi
    CALL_LINUX SYS_PRCTL
1:  mov unit(%rip), %r8
2:  mov child_in(%rip), %edi
    mov buffer(%rip), %rsi
    mov %r8, %rdx
    CALL_LINUX SYS_READ
    test %rax, %rax
    jle child_exits
    sub %rax, %r8
    jnz 2b
    mov child_out(%rip), %edi
    mov $1, %edx
    CALL_LINUX SYS_WRITE
    jmp 1b

pipes:
    lea child_in(%rip), %rdi        # child_in, parent_out
    xor %esi, %esi
    CALL_LINUX SYS_PIPE2
    OR_FAIL
    lea parent_in(%rip), %rdi       # parent_in, child_out
    xor %esi, %esi
    CALL_LINUX SYS_PIPE2
    OR_FAIL
begin_child:
    mov 24(%r13), %rax
    mov %rax, unit(%rip)
    CALL_LINUX SYS_FORK
    OR_FAIL
    jz answer
    mov %rax, child(%rip)
    jmp done

connection:                         # TCP over 127.0.0.1, on a port that Linux chooses
    call stream_socket
    OR_FAIL
    mov %eax, opened(%rip)
    mov %eax, %edi
    lea address(%rip), %rsi
    movw $0, 2(%rsi)
    mov $16, %edx
    CALL_LINUX SYS_BIND
    OR_FAIL
    mov $1, %esi
    CALL_LINUX SYS_LISTEN
    OR_FAIL
    lea address(%rip), %rsi
    lea address_size(%rip), %rdx
    CALL_LINUX SYS_GETSOCKNAME
    OR_FAIL
    call stream_socket
    OR_FAIL
    mov %eax, parent_in(%rip)
    mov %eax, parent_out(%rip)
    mov %eax, %edi
    lea address(%rip), %rsi
    mov $16, %edx
    CALL_LINUX SYS_CONNECT
    OR_FAIL
    mov opened(%rip), %edi
    xor %esi, %esi
    xor %edx, %edx
    CALL_LINUX SYS_ACCEPT
    OR_FAIL
    mov %eax, child_in(%rip)
    mov %eax, child_out(%rip)
    mov %eax, %edi
    call at_once
    OR_FAIL
    mov parent_out(%rip), %edi
    call at_once
    OR_FAIL
    jmp begin_child

stream_socket:
    mov $AF_INET, %edi
    mov $SOCK_STREAM, %esi
    xor %edx, %edx
    CALL_LINUX SYS_SOCKET
    ret

at_once:                            # EDI: a socket that is to send without waiting for more
    mov $IPPROTO_TCP, %esi
    mov $TCP_NODELAY, %edx
    lea one(%rip), %r10
    mov $4, %r8d
    CALL_LINUX SYS_SETSOCKOPT
    ret

end_child:
    mov child(%rip), %rdi
    movq $0, child(%rip)
    test %rdi, %rdi
    jz 1f
    mov $SIGKILL, %esi
    CALL_LINUX SYS_KILL
    xor %esi, %esi
    xor %edx, %edx
    xor %r10d, %r10d
    CALL_LINUX SYS_WAIT4
1:  lea files(%rip), %rbx
2:  mov (%rbx), %edi
    movl $-1, (%rbx)
    CALL_LINUX SYS_CLOSE            # a socket is there twice, a file that was never opened is -1
    add $4, %rbx
    lea files_end(%rip), %rax
    cmp %rax, %rbx
    jb 2b
    jmp done

# -- the disk --------------------------------------------------------------------------------------

open_disk:
    mov path(%rip), %rdi
    mov 24(%r13), %rsi
    xor %edx, %edx
    CALL_LINUX SYS_OPEN
    OR_FAIL
    mov %eax, opened(%rip)
    jmp done

read_disk:
    mov $SYS_PREAD64, %r8d
    jmp disk
write_disk:
    mov $SYS_PWRITE64, %r8d
disk:                               # a page at a random place
    mov %rdi, %rbx
1:  call random
    xor %edx, %edx
    divq disk_pages(%rip)
    shl $12, %rdx
    mov %rdx, %r10
    mov opened(%rip), %edi
    mov buffer(%rip), %rsi
    mov $PAGE, %edx
    mov %r8d, %eax
    syscall
    cmp $PAGE, %rax
    jne short
    dec %rbx
    jnz 1b
    jmp done

# -- what all share --------------------------------------------------------------------------------

stay_on_this_processor:
    lea place(%rip), %rdi
    xor %esi, %esi
    xor %edx, %edx
    CALL_LINUX SYS_GETCPU
    mov place(%rip), %eax
    cmp $8 * CPU_BYTES, %eax
    jae return
    bts %eax, processors(%rip)
    xor %edi, %edi
    mov $CPU_BYTES, %esi
    lea processors(%rip), %rdx
    CALL_LINUX SYS_SCHED_SETAFFINITY
    ret

now:                                # RAX: nanoseconds
    sub $16, %rsp
    mov $CLOCK_MONOTONIC, %edi
    mov %rsp, %rsi
    CALL_LINUX SYS_CLOCK_GETTIME
    imul $1000000000, (%rsp), %rax
    add 8(%rsp), %rax
    add $16, %rsp
    ret

random:                             # RAX: xorshift64 (Marsaglia), 13, 7, 17
    mov state(%rip), %rax
    mov %rax, %rcx
    shl $13, %rcx
    xor %rcx, %rax
    mov %rax, %rcx
    shr $7, %rcx
    xor %rcx, %rax
    mov %rax, %rcx
    shl $17, %rcx
    xor %rcx, %rax
    mov %rax, state(%rip)
    ret

number:                             # RAX: the hexadecimal number at RSI
    xor %eax, %eax
1:  movzbl (%rsi), %ecx
    test %ecx, %ecx
    jz return
    sub $48, %ecx
    cmp $10, %ecx
    jb 2f
    sub $39, %ecx
2:  shl $4, %rax
    or %rcx, %rax
    inc %rsi
    jmp 1b

put:                                # RAX as 16 digits and a space
    mov written(%rip), %rdi
    mov $16, %ecx
1:  rol $4, %rax
    mov %eax, %edx
    and $15, %edx
    lea digits(%rip), %rsi
    mov (%rsi,%rdx), %dl
    mov %dl, (%rdi)
    inc %rdi
    dec %ecx
    jnz 1b
    movb $32, (%rdi)
    inc %rdi
    mov %rdi, written(%rip)
    ret

end_line:                           # in place of the last space
    mov written(%rip), %rdi
    movb $10, -1(%rdi)
    ret

flush:                              # a pipe may take it in parts
    lea text(%rip), %rsi
    mov written(%rip), %r8
    mov %rsi, written(%rip)
1:  mov %r8, %rdx
    sub %rsi, %rdx
    jz return
    mov $STDOUT, %edi
    CALL_LINUX SYS_WRITE
    test %rax, %rax
    jle unwritten
    add %rax, %rsi
    jmp 1b
unwritten:
    mov $1, %edi
    jmp exit

digits:
    .ascii "0123456789abcdef"
    .balign 8
measures:                           # begin, one sample, end, an argument
    .quad nothing, integer, nothing, 0
    .quad nothing, exiting, nothing, 0
    .quad nothing, system_call, nothing, 0
    .quad pipes, exchange, end_child, 1
    .quad nothing, process, nothing, 0
    .quad untouched, fault, nothing, 0
    .quad scatter, chase, nothing, 32 << 10
    .quad scatter, chase, nothing, 1 << 20
    .quad scatter, chase, nothing, BUFFER
    .quad fill, read_memory, nothing, 0
    .quad fill, copy_memory, nothing, 0
    .quad connection, exchange, end_child, 1
    .quad connection, exchange, end_child, BLOCK
    .quad open_disk, read_disk, end_child, O_RDONLY_DIRECT
    .quad open_disk, write_disk, end_child, O_WRONLY_DIRECT_DSYNC
measures_end:
arguments:
mask:       .quad 0
samples:    .quad 0
least:      .quad 0
path:       .quad 0
disk_pages: .quad 0
buffer:     .quad 0
cursor:     .quad 0
began:      .quad 0
unit:       .quad 0
child:      .quad 0
state:      .quad 0x2545f4914f6cdd1d
written:    .quad text
files:
child_in:   .long -1                # in the order in which pipe2 writes them
parent_out: .long -1
parent_in:  .long -1
child_out:  .long -1
opened:     .long -1
files_end:
one:        .long 1
place:      .long 0
address_size: .long 16
address:                            # AF_INET, port, 127.0.0.1
    .short AF_INET, 0
    .byte 127, 0, 0, 1
    .quad 0
    .balign 8
processors: .fill CPU_BYTES, 1, 0
text:
