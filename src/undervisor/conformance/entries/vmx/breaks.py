"""How each rule of VM entry is broken on one processor, or why it cannot be.

`arch.vmx.boundary` knows how on a processor that has everything.  What depends on the processor
(which bits it forces, how wide its addresses are, where pages are) is here.  A break counts only if
it breaks that rule and no other on this processor, or those besides that cannot but break with it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from undervisor.arch.rules import Outcome
from undervisor.arch.vmx.boundary import BREAKS, Break
from undervisor.arch.vmx.checks import (
    ENTRY_RULES,
    RULES,
    EntryInput,
    check_vm_entry,
    first_failure,
)
from undervisor.arch.vmx.checks.declare import VmxRule
from undervisor.arch.vmx.controls import CONTROL_WORDS
from undervisor.arch.vmx.exits import ExitReason
from undervisor.arch.vmx.fields import VmcsField as F
from undervisor.arch.x86.msr import Msr
from undervisor.conformance.entries.trial import How, NotApplicable, Patch, Seen, Trial
from undervisor.conformance.entries.vmx.states import (
    LINK,
    MSR_LIST,
    VMCS,
    VmxStates,
    patches,
    structure_fields,
)

Changes = dict[int, int]
Ways = Callable[[VmxStates, Mapping[int, int]], Iterator[Changes]]

RULE: Final = {rule.id: rule for rule in RULES}
_ABORT_SAVING_MSRS: Final = 1
_NON_CANONICAL: Final = 1 << 62
_BAD: Final = 2
"""Which entry of an MSR list is the bad one, counted from 1."""

# --- Ways that depend on the processor ------------------------------------------------------------


def _one(name: F, value: int) -> Changes:
    return {int(name): value}


def _uncover(word: F) -> Ways:
    """Clear a bit that this processor wants to be 1."""

    def ways(states: VmxStates, state: Mapping[int, int]) -> Iterator[Changes]:
        forced = states.capabilities.controls[word].must_be_one
        yield from (_one(word, state[word] & ~(1 << bit)) for bit in range(64) if forced >> bit & 1)

    return ways


def _exceed(word: F) -> Ways:
    """Set a bit that this processor wants to be 0, the undefined ones first."""

    def ways(states: VmxStates, state: Mapping[int, int]) -> Iterator[Changes]:
        allowed = states.capabilities.controls[word].may_be_one
        declared = CONTROL_WORDS[word].layout.DECLARED
        bits = sorted(range(word.bits), key=lambda bit: declared >> bit & 1)
        yield from (_one(word, state[word] | 1 << bit) for bit in bits if not allowed >> bit & 1)

    return ways


def _at_the_top(name: F) -> Ways:
    """An area that begins below the physical-address width and ends beyond it."""
    return lambda states, state: iter(
        [{name: (1 << states.capabilities.physical_address_width) - 16}]
    )


def _sets(name: F, bits: int) -> Ways:
    return lambda states, state: iter([{name: state[name] | bits}])


def _activities(states: VmxStates, state: Mapping[int, int]) -> Iterator[Changes]:
    yield from (_one(F.GUEST_ACTIVITY_STATE, activity) for activity in (1, 2, 3))


def _links(**inputs: int) -> Ways:
    """The link pointer at a page whose first bits are the processor's revision XOR `linked`."""

    def ways(states: VmxStates, state: Mapping[int, int]) -> Iterator[Changes]:
        linked = states.capabilities.basic.revision ^ inputs.get("linked", 0)
        yield {
            F.VMCS_LINK_POINTER: inputs.get("pointer", LINK),
            EntryInput.LINKED_VMCS: linked,
        }

    return ways


def _virtual_8086_without_protection(
    states: VmxStates, state: Mapping[int, int]
) -> Iterator[Changes]:
    changes = _apply(BREAKS["vmx.guest.rflags.vm-real"], state)
    yield changes | {F.EPT_POINTER: states.eptp()}


_C, _L = "vmx.controls.", "vmx.guest.link."
WAYS: Final[dict[str, Ways]] = {
    f"{_C}pin.must-be-one": _uncover(F.PIN_BASED_CONTROLS),
    f"{_C}primary.must-be-one": _uncover(F.PRIMARY_CONTROLS),
    f"{_C}secondary.must-be-one": _uncover(F.SECONDARY_CONTROLS),
    f"{_C}exit.primary.must-be-one": _uncover(F.EXIT_CONTROLS),
    f"{_C}entry.controls.must-be-one": _uncover(F.ENTRY_CONTROLS),
    f"{_C}pin.may-be-one": _exceed(F.PIN_BASED_CONTROLS),
    f"{_C}primary.may-be-one": _exceed(F.PRIMARY_CONTROLS),
    f"{_C}secondary.may-be-one": _exceed(F.SECONDARY_CONTROLS),
    f"{_C}tertiary.may-be-one": _exceed(F.TERTIARY_CONTROLS),
    f"{_C}vm-functions.may-be-one": _exceed(F.VM_FUNCTION_CONTROLS),
    f"{_C}exit.primary.may-be-one": _exceed(F.EXIT_CONTROLS),
    f"{_C}exit.secondary.may-be-one": _exceed(F.SECONDARY_EXIT_CONTROLS),
    f"{_C}entry.controls.may-be-one": _exceed(F.ENTRY_CONTROLS),
    f"{_C}exit.msr-store.last": _at_the_top(F.EXIT_MSR_STORE_ADDRESS),
    f"{_C}exit.msr-load.last": _at_the_top(F.EXIT_MSR_LOAD_ADDRESS),
    f"{_C}entry.msr-load.last": _at_the_top(F.ENTRY_MSR_LOAD_ADDRESS),
    f"{_C}pid-pointers.last": _at_the_top(F.PID_POINTER_TABLE_ADDRESS),
    f"{_C}eptp.accessed-dirty": _sets(F.EPT_POINTER, 1 << 6),
    f"{_C}eptp.supervisor-shadow-stack": _sets(F.EPT_POINTER, 1 << 7),
    "vmx.guest.activity.supported": _activities,
    "vmx.guest.rflags.vm-real": _virtual_8086_without_protection,
    f"{_L}aligned": _links(pointer=LINK | 0x10),
    f"{_L}revision": _links(linked=1),
    f"{_L}shadow": _links(linked=1 << 31),
    f"{_L}current": _links(pointer=VMCS),
}

# --- MSR lists ------------------------------------------------------------------------------------

MSR_LOADS: Final = {
    "vmx.msr-load.fs-base": (Msr.FS_BASE, 0, 0),
    "vmx.msr-load.gs-base": (Msr.GS_BASE, 0, 0),
    "vmx.msr-load.x2apic": (0x80B, 0, 0),
    "vmx.msr-load.smm-only": (0x9B, 0, 0),
    "vmx.msr-load.never-loaded": (Msr.BIOS_UPDT_TRIG, 0, 0),
    "vmx.msr-load.reserved": (Msr.KERNEL_GS_BASE, 1, 0),
    "vmx.msr-load.writable": (Msr.KERNEL_GS_BASE, 0, _NON_CANONICAL),
}
"""The entry of a VM-entry MSR-load area that breaks a rule: index, bits 63:32, value."""

MSR_STORES: Final = {
    "vmx.msr-store.x2apic": (0x80B, 0, 0),
    "vmx.msr-store.smm-only": (0x9E, 0, 0),
    "vmx.msr-store.reserved": (Msr.KERNEL_GS_BASE, 1, 0),
    "vmx.msr-store.readable": (0x1234, 0, 0),
}
"""The same for the VM-exit MSR-store area."""


def _listed(rule: str, states: VmxStates) -> Trial:
    """A list whose second entry is bad."""
    pages = dict(structure_fields())
    if rule in MSR_LOADS:
        entry, where, count = MSR_LOADS[rule], MSR_LIST, F.ENTRY_MSR_LOAD_COUNT
        expected = Seen(How.FAILED_ENTRY, ExitReason.ENTRY_FAILURE_MSR_LOADING, _BAD)
    else:
        entry, count = MSR_STORES[rule], F.EXIT_MSR_STORE_COUNT
        where = pages[F.EXIT_MSR_STORE_ADDRESS]
        expected = Seen(How.ABORT, _ABORT_SAVING_MSRS)
    harmless = struct.pack("<2IQ", Msr.SYSENTER_CS, 0, 0)
    bad = Patch(where + 16 * (_BAD - 1), struct.pack("<2IQ", *entry), harmless)
    return Trial(rule, "long", {count: _BAD}, expected, (bad,))


# --- Trials ---------------------------------------------------------------------------------------


def trial(rule: str, states: VmxStates) -> Trial | NotApplicable:
    """The attempt to break `rule`, or why there is none on this processor."""
    if rule in MSR_LOADS or rule in MSR_STORES:
        return _listed(rule, states)
    how = BREAKS[rule]
    base = states.valid(how.mode)
    if why := _reason(RULE[rule], how, states):
        return NotApplicable(rule, why)
    ways = WAYS[rule](states, base) if rule in WAYS else iter([_apply(how, base)])
    others: set[str] = set()
    for changes in ways:
        state = base | changes
        verdict = check_vm_entry(state, states.capabilities)
        broken = {violation.rule.id for violation in verdict.broken}
        if rule in broken and broken <= {rule} | how.also:
            return _trial(rule, how.mode, base, changes, states)
        others |= broken - {rule}
    return NotApplicable(rule, _unbreakable(RULE[rule], others))


def _trial(
    rule: str, mode: str, base: dict[int, int], changes: Changes, states: VmxStates
) -> Trial:
    state = base | changes
    failure = first_failure(state, states.capabilities)
    assert failure is not None, f"{rule} is broken"
    if failure.error is not None:
        expected = Seen(How.FAIL_VALID, failure.error)
    else:
        assert failure.exit_reason is not None
        expected = Seen(How.FAILED_ENTRY, failure.exit_reason, failure.qualification)
    written = {n: v for n, v in changes.items() if n not in _INPUTS and v != base[n]}
    return Trial(
        rule,
        mode,
        written,
        expected,
        patches(base, state),
        alone=F.HOST_RIP in written,
        outside=not state[EntryInput.LONG_MODE_ACTIVE],
    )


_INPUTS: Final = frozenset(int(name) for name in EntryInput)


def _apply(how: Break, base: Mapping[int, int]) -> Changes:
    """The break of `boundary` on another valid state."""
    changes = dict(how.values)
    for name, bits in how.sets.items():
        changes[name] = changes.get(name, base[name]) | bits
    for name, bits in how.clears.items():
        changes[name] = changes.get(name, base[name]) & ~bits
    return changes


# --- Why not --------------------------------------------------------------------------------------


def _reason(rule: VmxRule, how: Break, states: VmxStates) -> str:
    """What this processor lacks that the break needs; empty where nothing is."""
    state = how.state()
    for name, words in _NEVER.items():
        if state[name]:
            return words
    lacks = [
        f"{CONTROL_WORDS[word].layout.FIELDS[name].about or name}"
        for word, name in _needed_controls(rule, how, state)
        if not states.capabilities.controls[word].may_be_one
        & CONTROL_WORDS[word].layout.FIELDS[name].mask
    ]
    if lacks:
        return f"the processor does not offer: {', '.join(lacks)}"
    absent = [F(n).name for n in rule.reads if n not in _INPUTS and _is_absent(n, states)]
    if absent:
        return f"the processor has no field {', '.join(absent)}"
    if broken := states.broken(how.mode):
        return f"the processor has no valid state {how.mode!r}: {', '.join(broken)}"
    return ""


_NEVER: Final = {
    EntryInput.IN_SMM: "it takes a processor in SMM, which no guest can be in by itself",
    EntryInput.TRACING: "it takes a processor that traces itself by Intel PT",
}
"""What the probe cannot bring about; without it the entry would break other rules, or none."""


def _is_absent(name: int, states: VmxStates) -> bool:
    return name not in states.processor.fields


def _needed_controls(
    rule: VmxRule, how: Break, state: Mapping[int, int]
) -> Iterator[tuple[F, str]]:
    """The controls without which `state` would not break the rule."""
    for word, layout in CONTROL_WORDS.items():
        if word not in rule.reads:
            continue
        for name, bits in layout.layout.FIELDS.items():
            less = {**state, word: state[word] & ~bits.mask}
            if state[word] & bits.mask and rule.holds(less, how.capabilities):
                yield word, name


def _unbreakable(rule: VmxRule, others: set[str]) -> str:
    """Why no way breaks this rule alone: the processor lacks, or has, what the rule is about."""
    if others:
        return f"on this processor it cannot be broken without: {', '.join(sorted(others))}"
    return f"no state breaks it on this processor, which depends on {rule.assumes or 'what it has'}"


ALL: Final = tuple(rule.id for rule in RULES)
"""Every rule, in the manual's order."""
ABORTS: Final = frozenset(r.id for r in RULES if r.outcome is Outcome.ABORT_MSR_SAVING)
assert set(BREAKS) == {rule.id for rule in ENTRY_RULES}, "boundary breaks every rule of a VMCS"
