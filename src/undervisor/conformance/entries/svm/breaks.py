"""How each rule of VMRUN is broken on one processor, or why it cannot be.

As `vmx.breaks`; here nearly every way of `arch.svm.boundary` is good as it is, but for the limit of
physical addresses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from undervisor.arch.svm.boundary import BREAKS, LIMIT, Break
from undervisor.arch.svm.checks import RULES, SvmRule, check_vmrun
from undervisor.arch.svm.vmcb import VmcbField as F
from undervisor.arch.x86.registers import Cr0
from undervisor.conformance.entries.svm.states import SvmStates
from undervisor.conformance.entries.trial import How, NotApplicable, Seen, Trial

RULE: Final = {rule.id: rule for rule in RULES}
ALL: Final = tuple(RULE)
_INVALID: Final = Seen(How.INVALID)
HOST_PAGING: Final = "svm.np.host_paging"
_BELOW: Final = 0x1_0000
"""How far below the limit a structure may begin that ends beyond it."""


def trial(rule: str, states: SvmStates) -> Trial | NotApplicable:
    """The attempt to break `rule`, or why there is none on this processor."""
    how, capabilities = BREAKS[rule], states.capabilities
    if broken := states.broken(how.mode):
        return NotApplicable(rule, f"no valid state {how.mode!r} here: {', '.join(broken)}")
    if rule == HOST_PAGING:
        return _from_unpaged_host(how, states)
    base = states.valid(how.mode)
    changes = _apply(how, base, 1 << capabilities.physical_width)
    verdict = check_vmrun({**base, **changes}, capabilities)
    others = {violation.rule.id for violation in verdict.broken}
    if others != {rule}:
        return NotApplicable(rule, _unbreakable(RULE[rule], others - {rule}))
    written = {int(n): v for n, v in changes.items() if v != base[n]}
    return Trial(rule, how.mode, written, _INVALID)


def _from_unpaged_host(how: Break, states: SvmStates) -> Trial | NotApplicable:
    """The same VMCB, from a hypervisor that has switched paging off."""
    capabilities = replace(states.capabilities, host_cr0=Cr0.pe)
    if not check_vmrun(states.valid(how.mode), capabilities).broken:
        return NotApplicable(HOST_PAGING, _unbreakable(RULE[HOST_PAGING], set()))
    return Trial(HOST_PAGING, how.mode, {}, _INVALID, outside=True)


def _apply(how: Break, base: Mapping[F, int], limit: int) -> dict[F, int]:
    """The break of `boundary` on another valid state, its addresses moved to this limit."""
    changes = {name: _moved(value, limit) for name, value in how.values.items()}
    for name, bits in how.sets.items():
        changes[name] = changes.get(name, base[name]) | _moved(bits, limit)
    for name, bits in how.clears.items():
        changes[name] = changes.get(name, base[name]) & ~bits
    return changes


def _moved(value: int, limit: int) -> int:
    near = LIMIT - _BELOW <= value <= LIMIT
    return value - LIMIT + limit if near else value


def _unbreakable(rule: SvmRule, others: set[str]) -> str:
    """Why this rule cannot be broken alone: the processor lacks, or has, what it is about."""
    if others:
        return f"on this processor it cannot be broken without: {', '.join(sorted(others))}"
    return f"no state breaks it on this processor, which depends on {rule.assumes}"
