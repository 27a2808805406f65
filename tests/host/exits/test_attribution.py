"""Traces in the forms of trace-cmd, perf and trace_pipe, and whose each exit was."""

import struct
import time
from pathlib import Path

import pytest

from undervisor.errors import BadInput
from undervisor.host.exits.attribute import REASON_LIMIT, Attribution, Whose
from undervisor.host.exits.stats import parse_binary
from undervisor.host.exits.trace import TRACEPOINTS, Event, parse

FORMS = {
    "trace-cmd": " CPU {n}/KVM-{t}  [002]  {time:.6f}: {event}:   {rest}",
    "perf": "CPU {n}/KVM  {t} [002] {time:.6f}: kvm:{event}: {rest}",
    "trace_pipe": "     CPU {n}/KVM-{t}    [002] d..1. {time:.6f}: {event}: {rest}",
    "old perf": " qemu-system-x86 {t} [000] {time:.6f}: kvm:{event}: {rest}",
}
REST = {
    "kvm_entry": "vcpu 0, rip 0xffffffff81000000",
    "kvm_exit": "vcpu 0 reason {reason} rip 0x1000 info1 0x0 info2 0x0 intr_info 0x0",
    "kvm_nested_vmenter": "rip: 0x1000 vmcs: 0x1000 nested_rip: 0xfff0 int_ctl: 0x0 event_inj: 0x0",
    "kvm_nested_vmrun": "rip: 0x1000 vmcb: 0x1000 nrip: 0xfff0 int_ctl: 0x0 event_inj: 0x0 npt: on",
    "kvm_nested_vmexit": "vcpu 0 reason {reason} rip 0x1000 info1 0x0 info2 0x0",
    "kvm_nested_vmexit_inject": "reason: {reason} ext_inf1: 0x0 ext_inf2: 0x0 ext_int: 0x0",
}


def trace(form, *events):
    """Lines of a trace: `event` or `event:reason`, with @1 for the second vCPU."""
    lines = []
    for number, word in enumerate(events):
        word, _, vcpu = word.partition("@")
        event, _, reason = word.partition(":")
        rest = REST[event].format(reason=reason)
        n, t = vcpu or 0, 4100 + int(vcpu or 0)
        now = 100 + number / 1000
        lines.append(FORMS[form].format(n=n, t=t, time=now, event=event, rest=rest))
    return lines


def tally_of(lines):
    attribution = Attribution()
    attribution.feed(parse(lines))
    return attribution.finish()


def counts(tally):
    return {
        (whose.name, reason): number
        for whose in Whose
        for reason, number in tally.counts[whose].items()
        if number
    }


STORY = (
    "kvm_exit:CPUID", "kvm_entry",
    "kvm_exit:VMRESUME", "kvm_nested_vmenter", "kvm_entry",
    "kvm_exit:EPT_VIOLATION", "kvm_nested_vmexit:EPT_VIOLATION", "kvm_entry",
    "kvm_exit:CPUID", "kvm_nested_vmexit:CPUID", "kvm_nested_vmexit_inject:CPUID", "kvm_entry",
    "kvm_exit:VMREAD", "kvm_entry",
)  # fmt: skip
TOLD = {
    ("L1", "CPUID"): 1,
    ("L1", "VMRESUME"): 1,
    ("L1", "VMREAD"): 1,
    ("L2_TO_L0", "EPT_VIOLATION"): 1,
    ("L2_TO_L1", "CPUID"): 1,
}


def test_a_trace_of_a_real_kvm_with_three_levels():
    """From a Debian 6.1 kernel: its guest runs kvm_amd, and a guest of its own."""
    text = (Path(__file__).parent / "three-levels.txt").read_text()
    tally = tally_of(text.splitlines())
    number = {name: text.count(f" {name}: ") for name in TRACEPOINTS}
    assert tally.nested_entries == number["kvm_nested_vmenter"] > 5
    hardware = [tally.total(w) for w in (Whose.L1, Whose.L2_TO_L0, Whose.L2_TO_L1)]
    assert sum(hardware) == number["kvm_exit"]
    assert sum(hardware[1:]) == number["kvm_nested_vmexit"]
    assert hardware[2] + tally.total(Whose.MADE_UP) == number["kvm_nested_vmexit_inject"]
    assert tally.counts[Whose.L1]["VMRUN"] == tally.nested_entries
    assert not tally.counts[Whose.L2_TO_L1]["VMRUN"]
    assert (tally.vcpus, tally.lost, tally.total(Whose.UNKNOWN)) == (1, 0, 0)


@pytest.mark.parametrize("form", FORMS)
def test_every_exit_has_its_owner_in_every_form(form):
    tally = tally_of(trace(form, *STORY))
    assert counts(tally) == TOLD
    assert (tally.nested_entries, tally.vcpus, tally.lost) == (1, 1, 0)
    assert tally.seconds == pytest.approx((len(STORY) - 1) / 1000)


def test_the_old_name_of_the_nested_entry_counts():
    tally = tally_of(trace("perf", "kvm_exit:VMRUN", "kvm_nested_vmrun", "kvm_entry"))
    assert (tally.nested_entries, counts(tally)) == (1, {("L1", "VMRUN"): 1})


def test_vcpus_are_told_apart():
    lines = trace(
        "trace-cmd",
        "kvm_exit:CPUID", "kvm_exit:HLT@1", "kvm_nested_vmexit:HLT@1",
        "kvm_nested_vmexit_inject:HLT@1", "kvm_entry", "kvm_entry@1",
    )  # fmt: skip
    tally = tally_of(lines)
    assert counts(tally) == {("L1", "CPUID"): 1, ("L2_TO_L1", "HLT"): 1}
    assert tally.vcpus == 2


def test_an_exit_made_up_for_l1_is_not_the_hardwares():
    lines = trace(
        "perf",
        "kvm_exit:EXTERNAL_INTERRUPT", "kvm_nested_vmexit:EXTERNAL_INTERRUPT",
        "kvm_nested_vmexit_inject:PREEMPTION_TIMER", "kvm_entry",
    )  # fmt: skip
    assert counts(tally_of(lines)) == {
        ("L2_TO_L0", "EXTERNAL_INTERRUPT"): 1,
        ("MADE_UP", "PREEMPTION_TIMER"): 1,
    }


def test_without_nested_events_nothing_is_claimed():
    tally = tally_of(trace("perf", "kvm_exit:CPUID", "kvm_entry", "kvm_exit:HLT", "kvm_entry"))
    assert counts(tally) == {("UNKNOWN", "CPUID"): 1, ("UNKNOWN", "HLT"): 1}


def test_exits_beside_lost_events_are_unknown():
    lines = trace("trace-cmd", *STORY[:6])
    lines.append("CPU:2 [LOST 123 EVENTS]")
    tally = tally_of([*lines, *trace("trace-cmd", *STORY[8:])])
    assert tally.lost == 1
    assert counts(tally)["UNKNOWN", "EPT_VIOLATION"] == 1
    assert counts(tally)["L2_TO_L1", "CPUID"] == 1


def test_the_last_exit_of_a_trace_counts():
    assert counts(tally_of(trace("perf", *STORY[:3], "kvm_nested_vmenter")))["L1", "VMRESUME"] == 1


@pytest.mark.parametrize("word", ["EXIT_REASON_CPUID", "SVM_EXIT_CPUID", "exit_cpuid", "cpuid"])
def test_the_names_of_a_reason_are_one(word):
    records = list(parse(trace("perf", f"kvm_exit:{word}")))
    assert [(r.event, r.reason) for r in records] == [(Event.EXIT, "CPUID")]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "cpus=4",
        "x" * 200_000,
        "kvm_exit: reason",
        "\0" * 5000,
        "a-1 [0] 1.0: kvm_exit",
        "[" * 9999,
    ],
)
def test_a_line_that_is_no_event_is_passed_over(line):
    start = time.monotonic()
    assert list(parse([line])) == []
    assert time.monotonic() - start < 1


def test_a_flood_of_reasons_is_bounded():
    lines = (line for n in range(REASON_LIMIT * 3) for line in trace("perf", f"kvm_exit:R{n}"))
    tally = tally_of(lines)
    assert len(tally.counts[Whose.UNKNOWN]) <= REASON_LIMIT + 1
    assert tally.total(Whose.UNKNOWN) == REASON_LIMIT * 3


def stats_file(*counters, name_size=48):
    """A file as KVM_GET_STATS_FD gives it: counters are (name, flags, values)."""
    stride = 16 + name_size
    descriptors = 24 + name_size
    data = descriptors + len(counters) * stride
    raw = struct.pack("<6I", 0, name_size, len(counters), 24, descriptors, data)
    raw += b"kvm-4121".ljust(name_size, b"\0")
    offset, values = 0, b""
    for name, flags, numbers in counters:
        raw += struct.pack("<IhHII", flags, 0, len(numbers), offset, 0)
        raw += name.encode().ljust(name_size, b"\0")
        values += struct.pack(f"<{len(numbers)}Q", *numbers)
        offset += 8 * len(numbers)
    return raw + values


def test_the_binary_stats_file_is_read():
    raw = stats_file(("exits", 0x00, [12]), ("halt_poll_success_hist", 0x24, [1, 2, 3]))
    name, counters = parse_binary(raw)
    assert name == "kvm-4121"
    assert [(c.name, c.kind, c.unit, c.values) for c in counters] == [
        ("exits", "cumulative", "", (12,)),
        ("halt_poll_success_hist", "logarithmic histogram", "seconds", (1, 2, 3)),
    ]


@pytest.mark.parametrize("cut", [0, 10, 24, 60, 100, -1])
def test_a_cut_stats_file_is_bad_input(cut):
    raw = stats_file(("exits", 0, [12]), ("nested_run", 0, [3]))
    with pytest.raises(BadInput):
        parse_binary(raw[:cut])


@pytest.mark.parametrize("at", range(0, 24, 4))
def test_a_stats_header_that_lies_is_bad_input_or_harmless(at):
    raw = bytearray(stats_file(("exits", 0, [12])))
    raw[at : at + 4] = b"\xff\xff\xff\xff"
    try:
        _, counters = parse_binary(bytes(raw))
    except BadInput:
        return
    assert at == 0  # the flags word says nothing that we use
    assert counters[0].values == (12,)


def test_without_nested_events_that_were_to_come_every_exit_is_l1s():
    attribution = Attribution(nested_recorded=True)
    attribution.feed(parse(trace("trace_pipe", "kvm_exit:CPUID", "kvm_entry")))
    assert counts(attribution.finish()) == {("L1", "CPUID"): 1}


def test_vcpus_are_counted_while_events_still_come():
    attribution = Attribution()
    attribution.feed(parse(trace("perf", "kvm_exit:CPUID", "kvm_exit:HLT@1")))
    assert attribution.tally.vcpus == 2
