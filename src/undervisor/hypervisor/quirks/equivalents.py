"""Changes of the nested code that are none to L1, by the manual's words: no mutants.

A row names a function, and the change as `mutants` words it; the reason is what a reader checks.
Of the rules of VM entry, those are none that no state of the models `MODELS` breaks.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Final

_SLOWER: Final = "the quick way is not taken, and the other comes to the same"
_AGAIN: Final = "what is kept is worked out again, with the same result"
_FORGOTTEN: Final = "more translations are forgotten than must be, and are walked again"
_ASKED: Final = "an exit that nobody wants is handed on to L2"

_ROWS: Final = (
    # -- SVM
    ("svm.reset", "self.shadows.stale = True left out",
     "what INIT does to the translations of L2 is not said, and every VMRUN can flush them"),
    ("svm.controls.merge", "wanted & _BREAKPOINTS with another operator", _ASKED),
    ("svm.entry._load_controls", "svm.controls = current left out", _AGAIN),
    ("svm.entry._load_controls", "svm.monitor_armed = False left out",
     "whether a monitor stays armed over a world switch is not said"),
    ("svm.entry._something_waits", "svm.virtual & 256 with another operator", _SLOWER),
    ("svm.instructions.vmrun",
     "vcpu.state.q[_DR7] & _BREAKPOINTS with another operator", _SLOWER),
    ("svm.paging.is_current", "page < low reversed", _FORGOTTEN),
    ("svm.paging.is_current", "page + PAGE with another operator", _FORGOTTEN),
    ("svm.paging.select", "self.stale = False left out", _FORGOTTEN),
    ("svm.paging.select", "shadow.asid = asid left out", _FORGOTTEN),
    ("svm.paging.select", "self._all[key] = shadow left out", _FORGOTTEN),
    ("svm.paging.walk", "address & -PAGE with another operator", _FORGOTTEN),
    ("svm.paging.to_hpa", "len(shadow.known) >= _MOST_KNOWN reversed", _AGAIN),
    ("svm.paging.to_hpa", "shadow.known[page] = (found.gpa & -PAGE, write) left out", _AGAIN),
    ("svm.state.at", "len(self._vmcbs) >= _MOST_VMCBS reversed", _AGAIN),
    # -- VMX
    ("vmx.entry._prepare_host", "nested.host_of = vmcs left out", _AGAIN),
    ("vmx.controls._page_faults_depend",
     "fields[F.EXCEPTION_BITMAP] >> Vector.PF & 1 with another operator", _ASKED),
    ("vmx.controls._page_faults_depend",
     "fields[F.EXCEPTION_BITMAP] >> Vector.PF with another operator", _ASKED),
    ("vmx.controls.merge",
     "primary & PrimaryControls.use_tpr_shadow with another operator", _SLOWER),
    *(
        ("vmx.controls._plan", f"{gate} with another operator", _SLOWER)
        for gate in (
            "nested.entry_controls & EntryControls.load_pat",
            "pin & (PinBasedControls.preemption_timer | PinBasedControls.virtual_nmis)",
            "pin & PinBasedControls.preemption_timer",
            "leaving & _SAVES",
            "leaving & ExitControls.load_pat",
            "primary & _WATCHED",
            "pin & (PinBasedControls.preemption_timer"
            " | PinBasedControls.process_posted_interrupts)",
            "nested.secondary & SecondaryControls.virtual_interrupt_delivery",
        )
    ),
    *(
        ("vmx.controls._wanted", f"{control} with another operator", _ASKED)
        for control in (
            "primary & PrimaryControls.cr3_store_exiting",
            "primary & PrimaryControls.invlpg_exiting",
            "secondary & SecondaryControls.descriptor_table_exiting",
            "fields[F.EXCEPTION_BITMAP] & _SOFTWARE_EXCEPTIONS",
        )
    ),
    ("vmx.controls.merge",
     "fields[F.EXCEPTION_BITMAP] & _EXCEPTIONS with another operator", _ASKED),
    ("vmx.instructions.vmptrld", "revision & SHADOW_BIT with another operator",
     "the model that mutants run on has shadow VMCSs"),
    ("vmx.entry._launch", "nested.resident = vmcs left out", _SLOWER),
    ("vmx.entry._launch", "nested.tables_change = False left out", _AGAIN),
    ("vmx.instructions.undefined",
     "vcpu.state.d[usual.HFLAGS] & usual.MODE_MASK with another operator", _SLOWER),
    *(
        ("vmx.paging._length", change, "the manual leaves the length of these exits undefined")
        for change in (
            "vcpu.exit.event or vcpu.exit.info1 & _SILICON_FETCH negated",
            "vcpu.exit.info1 & _SILICON_FETCH with another operator",
            "vcpu.processor.instruction_bytes() negated",
        )
    ),
    ("vmx.instructions._remember", "len(_quick) >= _MOST_REMEMBERED reversed", _SLOWER),
    ("vmx.instructions._remember", "_quick[data] = quick left out", _SLOWER),
    ("vmx.instructions.undefined", "quick is None and data[15] negated", _SLOWER),
    ("vmx.state.abort", "gpa + ABORT_OFFSET with another operator",
     "the whole machine stops at a VMX abort: nobody is left to read the indicator"),
)  # fmt: skip
EQUIVALENT: Final[dict[tuple[str, str], str]] = {
    (f"nested.{function}", change): reason for function, change, reason in _ROWS
}

MODELS: Final = ("intel", "amd")
"""The CPU models that mutants run on."""
_NOT_ALONE: Final = frozenset(
    f"vmx.msr-{way}.{rule}" for way in ("load", "store") for rule in ("x2apic", "smm-only")
)
"""What breaks these breaks another rule of the lists too, which refuses it then."""


def breakable_rules() -> frozenset[str]:
    """The rules that some state breaks on `MODELS`, as `undervisor rules` has recorded it.

    Of the others, docs/rules-compared.md says why: the processor lacks the feature, or what breaks
    them breaks another rule first.
    """
    record = resources.files("undervisor") / "data" / "rules-compared.json"
    rules = json.loads(record.read_text(encoding="utf-8"))["rules"]
    ours = {name: row["builtin"] for name, row in rules.items()}
    return frozenset(
        name
        for name, row in ours.items()
        if row["result"] == "agrees" and row["cpu"] in MODELS and name not in _NOT_ALONE
    )
