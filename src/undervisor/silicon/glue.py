"""The native glue, written as LLVM IR and compiled at start-up.

It holds what cannot be Python.  Delivering an event through the guest's IDT may end in a `longjmp`
of the emulator, which must not cross Python's frames; moving a processor's state between the
running CPU and a VMCB is on the path of every switch between levels; counting executed blocks is
on the path of every block.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import llvmlite.binding as llvm

from undervisor.arch.svm.vmcb import VmcbField as V
from undervisor.silicon.layout import (
    CPU_EXCEPTION_INDEX,
    HFLAGS2_GIF,
    HFLAGS2_NESTED_PAGING,
    NESTED_PAGING_LONG_NX,
    SEGMENT_BASE,
    SEGMENT_FLAGS,
    SEGMENT_LIMIT,
    SEGMENT_SELECTOR,
    SEGMENT_SPARE,
    TLB_ADDEND,
    TLB_CODE,
    TLB_ENTRY_BITS,
    TLB_MASK,
    TLB_TABLE,
    Env,
    Hflags,
)

# Exit codes of the silicon that AMD does not define: what it has hooks for, but no intercept.
EXIT_SYSCALL = 0x3F0
EXIT_SYSENTER = 0x3F1
EXIT_BUDGET = 0x3F2
EXIT_IOIO = 0x7B
_EXIT_DOUBLE_FAULT = 0x48
EXIT_XSETBV = 0x8D
EXIT_LTR = 0x6D

# What VMRUN loads and #VMEXIT saves: VMCB offset, state offset, width in bits.
_CONTROLS = (
    (V.INTERCEPT_CR_READ, Env.INTERCEPT_CR_READ, 16),
    (V.INTERCEPT_CR_WRITE, Env.INTERCEPT_CR_WRITE, 16),
    (V.INTERCEPT_DR_READ, Env.INTERCEPT_DR_READ, 16),
    (V.INTERCEPT_DR_WRITE, Env.INTERCEPT_DR_WRITE, 16),
    (V.INTERCEPT_EXCEPTIONS, Env.INTERCEPT_EXCEPTIONS, 32),
    (V.INTERCEPT_WORD3, Env.INTERCEPT, 64),
    (V.N_CR3, Env.NESTED_CR3, 64),
)
_WORLD = (
    (V.GDTR_BASE, Env.GDTR + SEGMENT_BASE, 64),
    (V.GDTR_LIMIT, Env.GDTR + SEGMENT_LIMIT, 32),
    (V.IDTR_BASE, Env.IDTR + SEGMENT_BASE, 64),
    (V.IDTR_LIMIT, Env.IDTR + SEGMENT_LIMIT, 32),
    (V.EFER, Env.EFER, 64),
    (V.CR0, Env.CR0, 64),
    (V.CR2, Env.CR2, 64),
    (V.CR3, Env.CR3, 64),
    (V.CR4, Env.CR4, 64),
    (V.DR6, Env.DR6, 64),
    (V.DR7, Env.DR7, 64),
    (V.RIP, Env.RIP, 64),
    (V.RSP, Env.REGS + 8 * 4, 64),
    (V.RAX, Env.REGS, 64),
)
_WORLD_SEGMENTS = (
    (V.ES_SELECTOR, Env.ES),
    (V.CS_SELECTOR, Env.CS),
    (V.SS_SELECTOR, Env.SS),
    (V.DS_SELECTOR, Env.DS),
)
# What VMLOAD loads and VMSAVE saves.
_SYSCALL = (
    (V.KERNEL_GS_BASE, Env.KERNEL_GS_BASE, 64),
    (V.STAR, Env.STAR, 64),
    (V.LSTAR, Env.LSTAR, 64),
    (V.CSTAR, Env.CSTAR, 64),
    (V.SFMASK, Env.SFMASK, 64),
)
# The part of it that VMX transitions switch as well.
_SYSENTER = (
    (V.SYSENTER_CS, Env.SYSENTER_CS, 32),
    (V.SYSENTER_ESP, Env.SYSENTER_ESP, 64),
    (V.SYSENTER_EIP, Env.SYSENTER_EIP, 64),
)
_EXTRA_SEGMENTS = (
    (V.FS_SELECTOR, Env.FS),
    (V.GS_SELECTOR, Env.GS),
    (V.LDTR_SELECTOR, Env.LDTR),
)
_DELIVERY_BLOCKS = 16
_TSS_AVAILABLE = 0x8100  # descriptor flags: present, type 1 (16 bits) or, with the next, 9
_TSS_WIDTH = 0x0800
_CONDITION_CODES = 0x8D5
_DIRECTION = 0x400
_CC_OP_EFLAGS = 1


class _Body:
    """Writes the straight-line body of one IR function, a line per value."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._count = 0

    def value(self, operation: str) -> str:
        """Append an operation that gives a value; returns the value's name."""
        self._count += 1
        self.lines.append(f"  %v{self._count} = {operation}")
        return f"%v{self._count}"

    def load(self, base: str, offset: int, bits: int) -> str:
        pointer = self.value(f"getelementptr i8, ptr {base}, i64 {offset}")
        return self.value(f"load i{bits}, ptr {pointer}")

    def store(self, base: str, offset: int, bits: int, value: str) -> None:
        pointer = self.value(f"getelementptr i8, ptr {base}, i64 {offset}")
        self.lines.append(f"  store i{bits} {value}, ptr {pointer}")

    def widen(self, value: str, bits: int, to: int) -> str:
        return self.value(f"zext i{bits} {value} to i{to}")

    def narrow(self, value: str, bits: int, to: int) -> str:
        return self.value(f"trunc i{bits} {value} to i{to}")

    def bit(self, value: str, bits: int, position: int) -> str:
        """Bit `position` of a value, as an i32 that is 0 or 1."""
        shifted = self.value(f"lshr i{bits} {value}, {position}")
        if bits == 64:
            shifted = self.narrow(shifted, 64, 32)
        return self.value(f"and i32 {shifted}, 1")

    def both(self, operation: str, left: str, right: str, bits: int = 32) -> str:
        return self.value(f"{operation} i{bits} {left}, {right}")

    def place(self, into: str, bit: str, position: int) -> str:
        """`into | bit << position`."""
        return self.both("or", into, self.value(f"shl i32 {bit}, {position}"))

    def move(self, source: str, target: str, moves: Any, *, to_state: bool) -> None:
        """Copy scalar fields between a VMCB and the state; a wider field gets zeros above."""
        for vmcb, env, bits in moves:
            come, go = (vmcb, env) if to_state else (env, vmcb)
            value = self.load(source, come, bits)
            width = 8 * vmcb.width
            if not to_state and bits < width:
                value, bits = self.widen(value, bits, width), width
            self.store(target, go, bits, value)

    def load_segment(self, vmcb: int, env: int) -> None:
        """Segment register from the VMCB: 12 attribute bits become descriptor flags."""
        self.store(
            "%env",
            env + SEGMENT_SELECTOR,
            32,
            self.widen(self.load("%vmcb", vmcb, 16), 16, 32),
        )
        attributes = self.widen(self.load("%vmcb", vmcb + 2, 16), 16, 32)
        low = self.value(f"shl i32 {self.both('and', attributes, '255')}, 8")
        high = self.value(f"shl i32 {self.both('and', attributes, '3840')}, 12")
        self.store("%env", env + SEGMENT_FLAGS, 32, self.both("or", low, high))
        self.store("%env", env + SEGMENT_LIMIT, 32, self.load("%vmcb", vmcb + 4, 32))
        self.store("%env", env + SEGMENT_BASE, 64, self.load("%vmcb", vmcb + 8, 64))

    def save_segment(self, vmcb: int, env: int) -> None:
        """Segment register to the VMCB."""
        selector = self.narrow(self.load("%env", env + SEGMENT_SELECTOR, 32), 32, 16)
        self.store("%vmcb", vmcb, 16, selector)
        flags = self.load("%env", env + SEGMENT_FLAGS, 32)
        low = self.both("and", self.value(f"lshr i32 {flags}, 8"), "255")
        high = self.both("and", self.value(f"lshr i32 {flags}, 12"), "3840")
        self.store("%vmcb", vmcb + 2, 16, self.narrow(self.both("or", low, high), 32, 16))
        self.store("%vmcb", vmcb + 4, 32, self.load("%env", env + SEGMENT_LIMIT, 32))
        self.store("%vmcb", vmcb + 8, 64, self.load("%env", env + SEGMENT_BASE, 64))

    def load_task_register(self) -> None:
        """TR: the emulator aborts the process over one that is no available TSS.

        It gets a present one of the same width, as LTR would have cached it; the attributes that
        the VMCB has, busy as a rule, are kept in the padding.
        """
        self.load_segment(V.TR_SELECTOR, Env.TR)
        attributes = self.widen(self.load("%vmcb", V.TR_SELECTOR + 2, 16), 16, 32)
        self.store("%env", Env.TR + SEGMENT_SPARE, 32, attributes)
        flags = self.load("%env", Env.TR + SEGMENT_FLAGS, 32)
        kept = self.both("and", flags, str(~0xFF00 | _TSS_WIDTH))
        self.store("%env", Env.TR + SEGMENT_FLAGS, 32, self.both("or", kept, str(_TSS_AVAILABLE)))

    def save_task_register(self) -> None:
        """TR to the VMCB, with the attributes that it came with."""
        self.save_segment(V.TR_SELECTOR, Env.TR)
        attributes = self.load("%env", Env.TR + SEGMENT_SPARE, 32)
        self.store("%vmcb", V.TR_SELECTOR + 2, 16, self.narrow(attributes, 32, 16))

    def load_rflags(self) -> None:
        """RFLAGS from the VMCB: the emulator keeps the condition codes and DF apart."""
        rflags = self.load("%vmcb", V.RFLAGS, 64)
        self.store("%env", Env.CC_SRC, 64, self.both("and", rflags, str(_CONDITION_CODES), 64))
        self.store("%env", Env.CC_DST, 64, "0")
        self.store("%env", Env.CC_OP, 32, str(_CC_OP_EFLAGS))
        direction = self.value(f"shl i32 {self.bit(rflags, 64, 10)}, 1")
        self.store("%env", Env.DF, 32, self.both("sub", "1", direction))
        kept = self.both("and", rflags, str(~(_CONDITION_CODES | _DIRECTION)), 64)
        self.store("%env", Env.RFLAGS, 64, self.both("or", kept, "2", 64))

    def compute_hflags(self) -> None:
        """The flags that select a translation, from the state just loaded."""
        cr0, cr4 = self.load("%env", Env.CR0, 64), self.load("%env", Env.CR4, 64)
        efer, rflags = self.load("%env", Env.EFER, 64), self.load("%vmcb", V.RFLAGS, 64)
        cs = self.load("%env", Env.CS + SEGMENT_FLAGS, 32)
        ss = self.load("%env", Env.SS + SEGMENT_FLAGS, 32)
        flags = self.widen(self.load("%vmcb", V.CPL, 8), 8, 32)
        flags = self.both("or", self.both("and", flags, "3"), str(1 << Hflags.GUEST))
        for source, position, flag in (
            (cr0, 0, Hflags.PE),
            (cr0, 1, Hflags.MP),
            (cr0, 2, Hflags.EM),
            (cr0, 3, Hflags.TS),
            (cr4, 9, Hflags.OSFXSR),
            (cr4, 21, Hflags.SMAP),
            (efer, 10, Hflags.LMA),
            (efer, 12, Hflags.SVME),
            (self.load("%vmcb", V.INTERRUPT_SHADOW, 64), 0, Hflags.INTERRUPT_SHADOW),
        ):
            flags = self.place(flags, self.bit(source, 64, position), flag)
        long_code = self.both("and", self.bit(efer, 64, 10), self.bit(cs, 32, 21))
        not_long = self.both("xor", long_code, "1")
        code32 = self.both("or", long_code, self.bit(cs, 32, 22))
        stack32 = self.both("or", long_code, self.bit(ss, 32, 22))
        ds, es, ss_base = (
            self.load("%env", register + SEGMENT_BASE, 64) for register in (Env.DS, Env.ES, Env.SS)
        )
        bases = self.both("or", self.both("or", ds, es, 64), ss_base, 64)
        based = self.value(f"zext i1 {self.value(f'icmp ne i64 {bases}, 0')} to i32")
        real = self.both("xor", self.both("and", self.bit(cr0, 64, 0), code32), "1")
        segmented = self.both("or", self.both("or", real, self.bit(rflags, 64, 17)), based)
        flags = self.place(flags, long_code, Hflags.CS64)
        flags = self.place(flags, code32, Hflags.CS32)
        flags = self.place(flags, stack32, Hflags.SS32)
        flags = self.place(flags, self.both("and", segmented, not_long), Hflags.ADDSEG)
        self.store("%env", Env.HFLAGS, 32, flags)

    def function(self, signature: str) -> str:
        return "\n".join([f"define void {signature} {{", *self.lines, "  ret void", "}"])


def _load_world() -> str:
    body = _Body()
    body.move("%vmcb", "%env", _CONTROLS + _WORLD, to_state=True)
    for vmcb, env in _WORLD_SEGMENTS:
        body.load_segment(vmcb, env)
    body.load_rflags()
    body.compute_hflags()
    body.store("%env", Env.HFLAGS2, 32, str(HFLAGS2_GIF | HFLAGS2_NESTED_PAGING))
    body.store("%env", Env.NESTED_PAGING_MODE, 32, str(NESTED_PAGING_LONG_NX))
    body.store("%env", Env.VMCB, 64, "%hpa")
    body.store("%env", Env.OLD_EXCEPTION, 32, "-1")
    body.store("%env", Env.EXCEPTION_IS_INT, 32, "0")
    body.lines.append("  call void @tlb_flush(ptr %cpu)")
    return body.function("@load_world(ptr %cpu, ptr %env, ptr %vmcb, i64 %hpa)")


def _save_world() -> str:
    body = _Body()
    body.move("%env", "%vmcb", _WORLD, to_state=False)
    for vmcb, env in _WORLD_SEGMENTS:
        body.save_segment(vmcb, env)
    body.store("%vmcb", V.RFLAGS, 64, body.value("call i64 @read_eflags(ptr %env)"))
    hflags = body.load("%env", Env.HFLAGS, 32)
    cpl = body.narrow(body.both("and", hflags, "3"), 32, 8)
    body.store("%vmcb", V.CPL, 8, cpl)
    shadow = body.widen(body.bit(hflags, 32, Hflags.INTERRUPT_SHADOW), 32, 64)
    body.store("%vmcb", V.INTERRUPT_SHADOW, 64, shadow)
    return body.function("@save_world(ptr %env, ptr %vmcb)")


def _load_extra(name: str, moves: tuple[tuple[int, int, int], ...]) -> str:
    body = _Body()
    body.move("%vmcb", "%env", moves, to_state=True)
    for vmcb, env in _EXTRA_SEGMENTS:
        body.load_segment(vmcb, env)
    body.load_task_register()
    return body.function(f"@{name}(ptr %env, ptr %vmcb)")


def _save_extra(name: str, moves: tuple[tuple[int, int, int], ...]) -> str:
    body = _Body()
    body.move("%env", "%vmcb", moves, to_state=False)
    for vmcb, env in _EXTRA_SEGMENTS:
        body.save_segment(vmcb, env)
    body.save_task_register()
    return body.function(f"@{name}(ptr %env, ptr %vmcb)")


# What Python's exit handler may ask for when it returns.
ACTION_RESUME = 0
ACTION_STOP = 1
ACTION_DELIVER = 2  # the event in exception_index, error_code, is_int, next_rip
ACTION_DELIVER_HARDWARE = 3  # vector in exception_index, no error code

_HOOKS = f"""
declare i32 @on_exit(i32)
declare void @do_interrupt(ptr)
declare void @do_hardware_interrupt(ptr, i32, i32)
declare void @vmexit(ptr, i32, i64, i64)
declare void @tlb_flush(ptr)
declare i64 @read_eflags(ptr)
declare i32 @emu_stop(ptr)
declare ptr @llvm.returnaddress(i32)
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)

@cpu = global ptr null
@env = global ptr null
@budget = global i64 0
@blocks = global i64 0
@kicked = global i64 0

; Every exception and every #VMEXIT comes here from the emulator's main loop.
@exit_cost = global i64 0

; An exit takes as much of the clock and of the budget as this many blocks.
define void @charge() {{
  %cost = load i64, ptr @exit_cost
  %count = load i64, ptr @blocks
  %later = add i64 %count, %cost
  store i64 %later, ptr @blocks
  %left = load i64, ptr @budget
  %less = sub i64 %left, %cost
  store i64 %less, ptr @budget
  ret void
}}

define void @on_interrupt(ptr %uc, i32 %number, ptr %user) {{
  %cpu = load ptr, ptr @cpu
  %env = load ptr, ptr @env
  call void @mend_error_code(ptr %env, i32 %number)
  %is_exception = icmp ult i32 %number, 256
  br i1 %is_exception, label %exception, label %exit

; The emulator combines two exceptions into a double fault and looks at no intercept for it.
exception:
  %is_double_fault = icmp eq i32 %number, 8
  br i1 %is_double_fault, label %double, label %native
double:
  %intercepts_at = getelementptr i8, ptr %env, i64 {Env.INTERCEPT_EXCEPTIONS.value}
  %intercepts = load i32, ptr %intercepts_at
  %double_bit = and i32 %intercepts, 256
  %double_wanted = icmp ne i32 %double_bit, 0
  br i1 %double_wanted, label %leave, label %native

; A delivery takes time like a few blocks: one whose handler cannot be fetched may never end.
native:
  call void @do_interrupt(ptr %cpu)
  call void @delivered(ptr %env)
  %more = call i1 @count(i64 {_DELIVERY_BLOCKS})
  br i1 %more, label %done, label %spent
exit:
  %real = sub i32 %number, 256
  br label %leave
spent:
  br label %leave
leave:
  %code = phi i32 [ %real, %exit ], [ {EXIT_BUDGET}, %spent ], [ {_EXIT_DOUBLE_FAULT}, %double ]
  call void @fetch(ptr %env)
  call void @charge()
  %action = call i32 @on_exit(i32 %code)
  switch i32 %action, label %done [ i32 {ACTION_STOP}, label %stop
                                    i32 {ACTION_DELIVER}, label %deliver
                                    i32 {ACTION_DELIVER_HARDWARE}, label %hardware ]
stop:
  call i32 @emu_stop(ptr %uc)
  br label %done
hardware:
  %where = getelementptr i8, ptr %cpu, i64 {CPU_EXCEPTION_INDEX}
  %vector = load i32, ptr %where
  call void @do_hardware_interrupt(ptr %env, i32 %vector, i32 1)
  call void @delivered(ptr %env)
  br label %done
deliver:
  call void @do_interrupt(ptr %cpu)
  call void @delivered(ptr %env)
  br label %done
done:
  ret void
}}

define void @delivered(ptr %env) {{
  %is_int = getelementptr i8, ptr %env, i64 {Env.EXCEPTION_IS_INT.value}
  store i32 0, ptr %is_int
  %old = getelementptr i8, ptr %env, i64 {Env.OLD_EXCEPTION.value}
  store i32 -1, ptr %old
; The shadow of STI or MOV SS ends with the delivery of an event.
  %flags_at = getelementptr i8, ptr %env, i64 {Env.HFLAGS.value}
  %flags = load i32, ptr %flags_at
  %open = and i32 %flags, {~(1 << Hflags.INTERRUPT_SHADOW)}
  store i32 %open, ptr %flags_at
  ret void
}}

; The emulator's long mode puts the gate's offset, not 8 times its vector, into the error code of
; an exception that the IDT entry itself causes, and nowhere sets EXT.  SDM 3A "Error Code".
@private = global i64 0
define void @mend_error_code(ptr %env, i32 %number) {{
  %absent = icmp eq i32 %number, 11
  %general = icmp eq i32 %number, 13
  %absent_exit = icmp eq i32 %number, {256 + 0x40 + 11}
  %general_exit = icmp eq i32 %number, {256 + 0x40 + 13}
  %any1 = or i1 %absent, %general
  %any2 = or i1 %absent_exit, %general_exit
  %any = or i1 %any1, %any2
  br i1 %any, label %look, label %done
look:
  %hpa_at = getelementptr i8, ptr %env, i64 {Env.VMCB.value}
  %hpa = load i64, ptr %hpa_at
  %private = load i64, ptr @private
  %vmcb_at = add i64 %private, %hpa
  %vmcb = inttoptr i64 %vmcb_at to ptr
  %event_at = getelementptr i8, ptr %vmcb, i64 {V.EVENTINJ.value}
  %event = load i32, ptr %event_at
  %valid = icmp slt i32 %event, 0
  br i1 %valid, label %compare, label %done
compare:
  %vector = and i32 %event, 255
  %flags_at = getelementptr i8, ptr %env, i64 {Env.HFLAGS.value}
  %hflags = load i32, ptr %flags_at
  %mode = lshr i32 %hflags, {Hflags.LMA.value}
  %lma = and i32 %mode, 1
  %shift = add i32 %lma, 3
  %offset = shl i32 %vector, %shift
  %wrong = or i32 %offset, 2
  %error_at = getelementptr i8, ptr %env, i64 {Env.ERROR_CODE.value}
  %error = load i32, ptr %error_at
  %is_wrong = icmp eq i32 %error, %wrong
  br i1 %is_wrong, label %mend, label %done
mend:
; EXT is clear for INT n (type 4), and for INT3 and INTO where they are told apart (type 6).
  %kind = and i32 %event, {5 << 8}
  %software = icmp eq i32 %kind, {4 << 8}
  %external = select i1 %software, i32 2, i32 3
  %scaled = shl i32 %vector, 3
  %right = or i32 %scaled, %external
  store i32 %right, ptr %error_at
  br label %done
done:
  ret void
}}

; Count blocks; whether the guest may go on.
define i1 @count(i64 %blocks) alwaysinline {{
  %count = load i64, ptr @blocks
  %next = add i64 %count, %blocks
  store i64 %next, ptr @blocks
  %left = load i64, ptr @budget
  %less = sub i64 %left, %blocks
  store i64 %less, ptr @budget
  %kick = load i64, ptr @kicked
  %both = or i64 %less, %kick
  %more = icmp sge i64 %both, 0
  br i1 %more, label %go, label %stop
go:
  ret i1 true
stop:
  store i64 0, ptr @kicked
  ret i1 false
}}

; Where the nested page walk would drop PAGE_EXEC through a null pointer: a walk of the guest's
; own tables has no protection to narrow.  r14d is the access type (2: fetch), rcx the pointer.
@walk_resume = global i64 0
@walk_fault = global i64 0
define void @walk_no_execute() naked {{
  call void asm sideeffect "
    cmpl $$2, %r14d
    je 2f
    testq %rcx, %rcx
    je 1f
    andl $$-5, (%rcx)
 1: jmpq *walk_resume(%rip)
 2: jmpq *walk_fault(%rip)", ""()
  unreachable
}}

; The bytes at the instruction pointer, where the emulator's own TLB has just translated it: like
; the guest instruction bytes of AMD's decode assists.  The sixteenth is 0 where there are none.
@instruction = global [16 x i8] zeroinitializer
define void @fetch(ptr %env) {{
  %valid = getelementptr i8, ptr @instruction, i64 15
  store i8 0, ptr %valid
  %rip_at = getelementptr i8, ptr %env, i64 {Env.RIP.value}
  %rip = load i64, ptr %rip_at
  %base_at = getelementptr i8, ptr %env, i64 {Env.CS + SEGMENT_BASE}
  %base = load i64, ptr %base_at
  %wide = add i64 %base, %rip
  %flags_at = getelementptr i8, ptr %env, i64 {Env.HFLAGS.value}
  %hflags = load i32, ptr %flags_at
  %long = and i32 %hflags, {1 << Hflags.CS64}
  %is_long = icmp ne i32 %long, 0
  %narrow = and i64 %wide, 4294967295
  %linear = select i1 %is_long, i64 %wide, i64 %narrow
  %offset = and i64 %linear, 4095
  %inside = icmp ule i64 %offset, 4080
  br i1 %inside, label %index, label %none
index:
  %cpl = and i32 %hflags, 3
  %is_user = icmp eq i32 %cpl, 3
  %smap = and i32 %hflags, {1 << Hflags.SMAP}
  %has_smap = icmp ne i32 %smap, 0
  %rflags_at = getelementptr i8, ptr %env, i64 {Env.RFLAGS.value}
  %rflags = load i64, ptr %rflags_at
  %ac = and i64 %rflags, 262144
  %no_ac = icmp eq i64 %ac, 0
  %checked = and i1 %has_smap, %no_ac
  %kernel = select i1 %checked, i64 0, i64 2
  %mode = select i1 %is_user, i64 1, i64 %kernel
  %scaled = mul i64 %mode, 16
  %fast = getelementptr i8, ptr %env, i64 %scaled
  %mask_at = getelementptr i8, ptr %fast, i64 {TLB_MASK}
  %mask = load i64, ptr %mask_at
  %table_at = getelementptr i8, ptr %fast, i64 {TLB_TABLE}
  %table = load ptr, ptr %table_at
  %page_number = lshr i64 %linear, 12
  %mask_entries = lshr i64 %mask, {TLB_ENTRY_BITS}
  %entry_number = and i64 %mask_entries, %page_number
  %entry_offset = shl i64 %entry_number, {TLB_ENTRY_BITS}
  %entry = getelementptr i8, ptr %table, i64 %entry_offset
  %tag_at = getelementptr i8, ptr %entry, i64 {TLB_CODE}
  %tag = load i64, ptr %tag_at
  %page = and i64 %linear, -4096
  %hit = icmp eq i64 %tag, %page
  br i1 %hit, label %copy, label %none
copy:
  %addend_at = getelementptr i8, ptr %entry, i64 {TLB_ADDEND}
  %addend = load i64, ptr %addend_at
  %host = add i64 %linear, %addend
  %source = inttoptr i64 %host to ptr
  %bytes = load i128, ptr %source, align 1
  store i128 %bytes, ptr @instruction, align 1
  store i8 1, ptr %valid
  ret void
none:
  ret void
}}

; Every block of guest code comes here first: the clock, and the end of the slice.
define void @on_block(ptr %uc, i64 %address, i32 %size, ptr %user) {{
  %more = call i1 @count(i64 1)
  br i1 %more, label %go, label %exit
go:
  ret void
exit:
  %env = load ptr, ptr @env
  %where = getelementptr i8, ptr %env, i64 {Env.CS + SEGMENT_BASE}
  %base = load i64, ptr %where
  %rip = sub i64 %address, %base
  %instruction_pointer = getelementptr i8, ptr %env, i64 {Env.RIP.value}
  store i64 %rip, ptr %instruction_pointer
  call void @vmexit(ptr %env, i32 {EXIT_BUDGET}, i64 0, i64 0)
  ret void
}}
"""


def _redirect(name: str, arguments: str, code: int, information: str) -> str:
    """A stand-in for a helper of the emulator: leave the guest at this instruction with `code`."""
    return f"""
define void @{name}(ptr %env{arguments}) {{
  %caller = call ptr @llvm.returnaddress(i32 0)
  %return = ptrtoint ptr %caller to i64
  %site = sub i64 %return, 2
{information}
  call void @vmexit(ptr %env, i32 {code}, i64 %information, i64 %site)
  ret void
}}
"""


def _port_information(size: int, direction: int) -> str:
    """EXITINFO1 of an IOIO intercept: the port, the size and the direction."""
    return f"""  %port = and i32 %number, 65535
  %shifted = shl i32 %port, 16
  %narrow = or i32 %shifted, {size << 4 | direction}
  %information = zext i32 %narrow to i64"""


_NO_INFORMATION = "  %information = add i64 0, 0"

# A helper of the emulator and the exit that takes its place.
REDIRECTED = {
    "inb": (", i32 %number", EXIT_IOIO, _port_information(1, 1)),
    "inw": (", i32 %number", EXIT_IOIO, _port_information(2, 1)),
    "inl": (", i32 %number", EXIT_IOIO, _port_information(4, 1)),
    "outb": (", i32 %number, i32 %data", EXIT_IOIO, _port_information(1, 0)),
    "outw": (", i32 %number, i32 %data", EXIT_IOIO, _port_information(2, 0)),
    "outl": (", i32 %number, i32 %data", EXIT_IOIO, _port_information(4, 0)),
    "syscall": (", i32 %length", EXIT_SYSCALL, _NO_INFORMATION),
    "sysenter": (", i32 %length", EXIT_SYSENTER, _NO_INFORMATION),
    "xsetbv": (", i32 %number, i64 %data", EXIT_XSETBV, _NO_INFORMATION),
    "ltr": (", i32 %selector", EXIT_LTR, "  %information = zext i32 %selector to i64"),
}


_CANONICAL = (V.ES_BASE, V.CS_BASE, V.SS_BASE, V.DS_BASE, V.GDTR_BASE, V.IDTR_BASE)
_DR6_ONES, _DR6_WRITABLE = 0xFFFF_0FF0, 0xE00F
_DR7_ONES, _DR7_WRITABLE = 0x400, 0xFFFF_23FF
_RFLAGS_ONES, _RFLAGS_DEFINED = 0x2, 0x3F_7FD7


def _enter_svm() -> str:
    """VMRUN as a whole: the host's state away, the guest's from its VMCB into ours and loaded.

    `%guest` is the VMCB of L1's hypervisor, `%vmcb` ours.
    """
    body = _Body()
    body.lines.append("  call void @save_world(ptr %env, ptr %host)")
    size = V.CR2 + 8 - V.ES_SELECTOR
    to = body.value(f"getelementptr i8, ptr %vmcb, i64 {V.ES_SELECTOR.value}")
    come = body.value(f"getelementptr i8, ptr %guest, i64 {V.ES_SELECTOR.value}")
    copy = f"call void @llvm.memcpy.p0.p0.i64(ptr {to}, ptr {come}, i64 {size}, i1 false)"
    body.lines.append(f"  {copy}")
    for base in _CANONICAL:
        high = body.value(f"shl i64 {body.load('%vmcb', base, 64)}, 16")
        body.store("%vmcb", base, 64, body.value(f"ashr i64 {high}, 16"))
    for field, kept, ones in (
        (V.DR6, _DR6_WRITABLE, _DR6_ONES),
        (V.DR7, _DR7_WRITABLE, _DR7_ONES),
        (V.RFLAGS, _RFLAGS_DEFINED, _RFLAGS_ONES),
    ):
        value = body.both("and", body.load("%vmcb", field, 64), str(kept), 64)
        body.store("%vmcb", field, 64, body.both("or", value, str(ones), 64))
    cr0, efer = body.load("%vmcb", V.CR0, 64), body.load("%vmcb", V.EFER, 64)
    active = body.both("and", body.bit(cr0, 64, 31), body.bit(efer, 64, 8))
    lma = body.value(f"shl i64 {body.widen(active, 32, 64)}, 10")
    body.store("%vmcb", V.EFER, 64, body.both("or", body.both("and", efer, "-1025", 64), lma, 64))
    virtual = body.bit(body.load("%vmcb", V.RFLAGS, 64), 64, 17)
    cpl = body.both("or", body.widen(body.load("%vmcb", V.CPL, 8), 8, 32), f"{virtual}")
    cpl = body.both("or", cpl, body.value(f"shl i32 {virtual}, 1"))
    cpl = body.both("mul", cpl, body.bit(cr0, 64, 0))
    body.store("%vmcb", V.CPL, 8, body.narrow(cpl, 32, 8))
    shadow = body.both("and", body.load("%guest", V.INTERRUPT_SHADOW, 64), "1", 64)
    body.store("%vmcb", V.INTERRUPT_SHADOW, 64, shadow)
    body.lines.append("  call void @load_world(ptr %cpu, ptr %env, ptr %vmcb, i64 %hpa)")
    arguments = "ptr %cpu, ptr %env, ptr %host, ptr %guest, ptr %vmcb, i64 %hpa"
    return body.function(f"@enter_svm({arguments})")


def _leave_svm() -> str:
    """#VMEXIT as a whole: the guest's state into its VMCB, the host's loaded.

    CR2 and DR6 stay as they are; breakpoints are off.
    """
    body = _Body()
    body.lines.append("  call void @save_world(ptr %env, ptr %guest)")
    body.store("%host", V.CR2, 64, body.load("%env", Env.CR2, 64))
    body.store("%host", V.DR6, 64, body.load("%env", Env.DR6, 64))
    body.store("%host", V.DR7, 64, str(_DR7_ONES))
    body.lines.append("  call void @load_world(ptr %cpu, ptr %env, ptr %host, i64 %hpa)")
    return body.function("@leave_svm(ptr %cpu, ptr %env, ptr %guest, ptr %host, i64 %hpa)")


def source() -> str:
    """The whole module as LLVM IR."""
    stand_ins = [_redirect(f"leave_{name}", *row) for name, row in REDIRECTED.items()]
    worlds = [
        _load_world(),
        _save_world(),
        _enter_svm(),
        _leave_svm(),
        _load_extra("load_extra", _SYSCALL + _SYSENTER),
        _save_extra("save_extra", _SYSCALL + _SYSENTER),
        _load_extra("load_vmx_extra", _SYSENTER),
        _save_extra("save_vmx_extra", _SYSENTER),
        _VMX_WORLDS,
    ]
    return "\n".join([_HOOKS, *stand_ins, *worlds])


# What a VMX transition switches is VMRUN's world and a part of VMLOAD's.
_VMX_WORLDS = """
define void @load_vmx(ptr %cpu, ptr %env, ptr %vmcb, i64 %hpa) {
  call void @load_vmx_extra(ptr %env, ptr %vmcb)
  call void @load_world(ptr %cpu, ptr %env, ptr %vmcb, i64 %hpa)
  ret void
}
define void @save_vmx(ptr %env, ptr %vmcb) {
  call void @save_vmx_extra(ptr %env, ptr %vmcb)
  call void @save_world(ptr %env, ptr %vmcb)
  ret void
}
"""


def _target_machine() -> llvm.TargetMachine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()
    return llvm.Target.from_default_triple().create_target_machine(opt=2)


@lru_cache(maxsize=1)
def machine_code() -> bytes:
    """The compiled module, not linked: made once in a process, and there in its forks."""
    code: bytes = _target_machine().emit_object(llvm.parse_assembly(source()))
    return code


class Glue:
    """The compiled module: addresses of its functions and variables in this process."""

    def __init__(self, symbols: Mapping[str, int]) -> None:
        code, machine = machine_code(), _target_machine()
        for name, where in symbols.items():
            llvm.add_symbol(name, where)
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(source()), machine)
        self._engine.set_object_cache(getbuffer_func=lambda module: code)
        self._engine.finalize_object()

    def function(self, name: str) -> int:
        """The address of a function."""
        return int(self._engine.get_function_address(name))

    def variable(self, name: str) -> int:
        """The address of a global variable."""
        return int(self._engine.get_global_value_address(name))
