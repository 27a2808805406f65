"""What L1 lets L2 do by itself: VMFUNC, and VMREAD and VMWRITE of a shadow VMCS."""

from __future__ import annotations

from typing import Final

from undervisor.arch.vmx.capabilities import VmxMisc, VmxMsr
from undervisor.arch.vmx.controls import SecondaryControls
from undervisor.arch.vmx.errors import VmInstructionError as Error
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.registers import Rflags
from undervisor.conformance.expect import each, equal, true
from undervisor.conformance.suite import Need, guest_test
from undervisor.conformance.vmx.lab import EPTP, Changes, VmxLab
from undervisor.conformance.vmx.needs import EPT, control

FUNCTIONS: Final = control(SecondaryControls, "enable_vm_functions")
SHADOWING: Final = control(SecondaryControls, "vmcs_shadowing")
SWITCHING: Final = Need(
    "EPTP switching", lambda lab: bool(lab.l1.rdmsr(VmxMsr.IA32_VMX_VMFUNC).value & 1)
)
VMFUNC: Final = "VMFUNC—Invoke VM Function"
UD, GP = 6, 13
SHADOW_VMCS: Final = 1 << 31
NO_VMCS: Final = (1 << 64) - 1
LAST_FUNCTION, LAST_EPTP = 63, 511
BAD: Final = {
    3: "an EPTP of a reserved memory type", 0x8: "a page walk of 3 levels", 1 << 11: "bit 11",
}  # fmt: skip
"""What makes an EPTP a bad one: bits to flip."""
HIGH_HALVES: Final = 0xABCDEF01 << 32

# -- VM functions ----------------------------------------------------------------------------------


def _switching(lab: VmxLab) -> Changes:
    """EPTP switching with a list: the identity, one that has FREE at DATA, and bad ones.

    The last entry of the list is the identity again.
    """
    places = lab.places
    other = lab.ept(12, places.nested2)
    lab.write_u64(lab.nested_entry(places.data, root=places.nested2), places.free | 0x37)
    first = lab.ept(12)
    good = first[F.EPT_POINTER]
    lab.write_u64(places.eptp_list, good, other[F.EPT_POINTER], *(good ^ flip for flip in BAD))
    lab.write_u64(places.eptp_list + 8 * LAST_EPTP, first[F.EPT_POINTER])
    lab.write_u64(places.data, 0x11)
    lab.write_u64(places.free, 0x22)
    more = {F.VM_FUNCTION_CONTROLS: 1, F.EPTP_LIST_ADDRESS: places.eptp_list}
    return lab.secondary(first, enable_vm_functions=1) | more


@guest_test("SDM: EPTP Switching", f"SDM: {VMFUNC}", needs=[EPT, FUNCTIONS, SWITCHING])
def eptp_switching_changes_l2s_memory(lab: VmxLab) -> None:
    """VMFUNC with EAX 0 and ECX n takes the EPTP of entry n of the list, with no exit.

    The EPT pointer of the VMCS is then that one.
    """
    switch = f"movabs ${HIGH_HALVES:#x}, %rax; movabs ${HIGH_HALVES:#x} + {{}}, %rcx; vmfunc;"
    code = f"""
        mov DATA, %rbx; {switch.format(1)} mov DATA, %rsi
        {switch.format(LAST_EPTP)} mov DATA, %rdi; {switch.format(1)} mov DATA, %rbp
    """
    run = lab.run(code, _switching(lab), reads=[F.EPT_POINTER])
    run.ends()
    got = [run.registers[name] for name in ("rbx", "rsi", "rdi", "rbp")]
    equal("what L2 reads before and behind each switch", got, [0x11, 0x22, 0x11, 0x22])
    equal("the EPT pointer afterwards", run[F.EPT_POINTER], lab.places.nested2 | EPTP)


@guest_test("SDM: VM Functions", f"SDM: {VMFUNC}", needs=[EPT, FUNCTIONS, SWITCHING])
def a_vm_function_that_is_not_allowed_exits(lab: VmxLab) -> None:
    """A function that is off, an index above 511 and a bad EPTP exit, reason 59.

    L2 goes on with the tables that it had.  A number above 63 is no function: #UD.
    """
    begin = _switching(lab)
    off = begin | {F.VM_FUNCTION_CONTROLS: 0}
    cases = {
        "function 1": (1, 0, begin), "function 63": (LAST_FUNCTION, 0, begin),
        "function 0, off": (0, 0, off), "index 512": (0, 512, begin),
        "index 80000000H": (0, 1 << 31, begin),
    }  # fmt: skip
    cases |= {what: (0, 2 + n, begin) for n, what in enumerate(BAD.values())}
    lab.code("vmfunc")
    got = {}
    for name, (function, index, changes) in cases.items():
        run = lab.run(None, changes, {"rax": function, "rcx": index}, reads=[F.EPT_POINTER])
        got[name] = run.reason, run.length, run.rip, run[F.EPT_POINTER]
    wanted = ExitReason.VMFUNC, 3, lab.places.code, begin[F.EPT_POINTER]
    each("reason, length, RIP and the EPT pointer", got, wanted)
    for function in (LAST_FUNCTION + 1, 1 << 31):
        lab.run(None, begin, {"rax": function, "rcx": 0}).delivers(UD)


@guest_test(f"SDM: {VMFUNC}")
def vmfunc_is_undefined_unless_enabled(lab: VmxLab) -> None:
    """With "enable VM functions" 0, VMFUNC in L2 causes #UD."""
    lab.run("vmfunc").delivers(UD)


# -- VMCS shadowing --------------------------------------------------------------------------------

TSC, SELECTOR, RSP = F.TSC_OFFSET, F.GUEST_ES_SELECTOR, F.GUEST_RSP
VALUES: Final = {TSC: 0x1122334455667788, SELECTOR: 0x28, RSP: 0xFFFF800012345678}


def _shadowing(lab: VmxLab, values: Changes) -> Changes:
    """A shadow VMCS with some fields, and bitmaps that let L2 have all of it."""
    places = lab.places
    lab.fill(places.shadow, 0x1000)
    lab.write_u32(places.shadow, lab.facts.basic.revision | SHADOW_VMCS)
    with lab.batch() as batch:
        batch.vmclear(places.shadow)
        batch.vmptrld(places.shadow)
        batch.vmwrites(values, places.scratch)
        batch.vmclear(places.shadow)
    lab.fill(places.read_bitmap, 0x1000)
    lab.fill(places.write_bitmap, 0x1000)
    return lab.secondary(vmcs_shadowing=1) | {
        F.VMREAD_BITMAP_ADDRESS: places.read_bitmap,
        F.VMWRITE_BITMAP_ADDRESS: places.write_bitmap,
        F.VMCS_LINK_POINTER: places.shadow,
    }


def _shadow_field(lab: VmxLab, field: F) -> int:
    """A field of the shadow VMCS, as L1 reads it."""
    with lab.batch() as batch:
        batch.vmptrld(lab.places.shadow)
        value = batch.vmread(field)
        batch.vmclear(lab.places.shadow)
        batch.vmptrld(lab.places.control)
    return value.value.value


@guest_test("SDM: VMREAD—Read Field from Virtual-Machine Control Structure",
            "SDM: VMCS Shadowing Bitmap Addresses", needs=[SHADOWING])  # fmt: skip
def l2_reads_the_shadow_vmcs(lab: VmxLab) -> None:
    """VMREAD of L2 whose bit is 0 reads the shadow VMCS: whole fields and high halves."""
    begin = _shadowing(lab, VALUES)
    wanted = dict(VALUES) | {TSC + 1: VALUES[TSC] >> 32}
    for field, value in wanted.items():
        code = "stc; vmread %rcx, %rbx; pushfq; pop %rsi; vmread %rcx, DATA"
        run = lab.run(code, begin, {"rcx": field})
        run.ends()
        got = run.registers["rbx"], lab.read_u64(lab.places.data), run.registers["rsi"] & 0x8D5
        equal(f"register, memory and flags of VMREAD of {int(field):#x}", got, (value, value, 0))


@guest_test("SDM: VMWRITE—Write Field to Virtual-Machine Control Structure",
            "SDM: VMCS Shadowing Bitmap Addresses", needs=[SHADOWING])  # fmt: skip
def l2_writes_the_shadow_vmcs(lab: VmxLab) -> None:
    """VMWRITE of L2 whose bit is 0 writes the shadow VMCS, as much as the field has."""
    begin = _shadowing(lab, VALUES)
    value = 0x8877665544332211
    high = VALUES[TSC] & 0xFFFFFFFF | (value & 0xFFFFFFFF) << 32
    cases = {TSC: (TSC, value), TSC + 1: (TSC, high), SELECTOR: (SELECTOR, value & 0xFFFF),
             RSP: (RSP, value)}  # fmt: skip
    lab.write_u64(lab.places.data, value)
    for source in ("%rbx", "DATA"):
        for encoding, (field, wanted) in cases.items():
            begin = _shadowing(lab, VALUES)
            code = f"stc; vmwrite {source}, %rcx; pushfq; pop %rsi"
            run = lab.run(code, begin, {"rcx": encoding, "rbx": value})
            run.ends()
            got = _shadow_field(lab, field), run.registers["rsi"] & 0x8D5
            equal(
                f"the field and flags of VMWRITE {source} to {int(encoding):#x}", got, (wanted, 0)
            )


@guest_test("SDM: VMREAD—Read Field from Virtual-Machine Control Structure",
            "SDM: VMWRITE—Write Field to Virtual-Machine Control Structure",
            needs=[SHADOWING])  # fmt: skip
def what_the_shadow_vmcs_lacks_is_an_error(lab: VmxLab) -> None:
    """A field that does not exist is error 12, a read-only one 13, both VMfailValid.

    A processor that lets software write read-only fields writes them.
    """
    allowed = VmxMisc(lab.l1.rdmsr(VmxMsr.IA32_VMX_MISC).value).vmwrite_any_field
    absent = 0x7FFE
    for text, encoding, error in (
        ("vmread %rcx, %rbx", absent, Error.ACCESS_TO_UNSUPPORTED_COMPONENT),
        ("vmwrite %rbx, %rcx", absent, Error.ACCESS_TO_UNSUPPORTED_COMPONENT),
        ("vmwrite %rbx, %rcx", F.EXIT_REASON,
         None if allowed else Error.VMWRITE_TO_READ_ONLY_COMPONENT),
    ):  # fmt: skip
        begin = _shadowing(lab, VALUES)
        run = lab.run(f"stc; {text}; pushfq; pop %rsi", begin, {"rcx": encoding, "rbx": 0x99},
                      reads=[F.VM_INSTRUCTION_ERROR])  # fmt: skip
        run.ends()
        flags = 0 if error is None else int(Rflags.zf)
        equal(f"the flags of {text}, {int(encoding):#x}", run.registers["rsi"] & 0x8D5, flags)
        if error is None:
            equal("the field of the shadow VMCS", _shadow_field(lab, F.EXIT_REASON), 0x99)
            continue
        # In which of the two VMCSs the number is the manual leaves open.
        numbers = _shadow_field(lab, F.VM_INSTRUCTION_ERROR), run[F.VM_INSTRUCTION_ERROR]
        true(f"one VMCS must have error {int(error)}", int(error) in numbers, *numbers)


@guest_test("SDM: VMCS Shadowing Bitmap Addresses",
            "SDM: Instructions That Cause VM Exits Conditionally", needs=[SHADOWING])  # fmt: skip
def the_bitmaps_decide_which_fields_exit(lab: VmxLab) -> None:
    """Bit n of a bitmap makes VMREAD or VMWRITE of encoding n exit, and no other.

    An encoding above 7FFFH exits always.
    """
    begin, places = _shadowing(lab, VALUES), lab.places
    for text, bitmap, reason in (
        ("vmread %rcx, %rbx", places.read_bitmap, ExitReason.VMREAD),
        ("vmwrite %rbx, %rcx", places.write_bitmap, ExitReason.VMWRITE),
    ):
        lab.code(text)
        for field in (TSC, SELECTOR, RSP):
            lab.fill(bitmap, 0x1000)
            lab.set_bit(bitmap, field)
            lab.run(None, begin, {"rcx": field}).exits_with(reason)
            lab.fill(bitmap, 0x1000, 0xFF)
            lab.set_bit(bitmap, field, False)
            lab.run(None, begin, {"rcx": field}).ends()
        lab.fill(bitmap, 0x1000)
        for encoding in (0x8000 + TSC, 1 << 32 | TSC):
            lab.run(None, begin, {"rcx": encoding}).exits_with(reason)


@guest_test("SDM: VMREAD—Read Field from Virtual-Machine Control Structure",
            "SDM: VMWRITE—Write Field to Virtual-Machine Control Structure",
            needs=[SHADOWING])  # fmt: skip
def without_a_shadow_vmcs_it_fails(lab: VmxLab) -> None:
    """With a link pointer of all ones, VMREAD and VMWRITE that do not exit are VMfailInvalid."""
    begin = _shadowing(lab, VALUES) | {F.VMCS_LINK_POINTER: NO_VMCS}
    for text in ("vmread %rcx, %rbx", "vmwrite %rbx, %rcx"):
        run = lab.run(f"{text}; pushfq; pop %rsi", begin, {"rcx": TSC})
        run.ends()
        equal(f"the flags of {text}", run.registers["rsi"] & 0x8D5, int(Rflags.cf))
