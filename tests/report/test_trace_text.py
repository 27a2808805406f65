"""A transition in words, and which ones a filter lets through."""

import json

import pytest
from trace_things import Step

from undervisor.errors import BadInput
from undervisor.report.trace.transition import json_line, parse_filter, text


def test_a_line_says_when_where_from_where_to_why_and_what_was_done():
    assert text(Step()) == (
        "    0.005000 ms  vCPU 0  L2 -> L0 -> L1  CPUID                    rip 0x1036a4  "
        "leaf 0x1.0x0  => reflect (L1 intercepts it)"
    )


def test_a_line_leaves_out_what_there_is_not():
    line = text(Step(why="", detail=""))
    assert line.endswith("rip 0x1036a4  => reflect")


def test_the_json_line_has_every_field_and_addresses_that_no_reader_rounds():
    found = json.loads(json_line(Step(rip=0xFFFF_FFFF_8000_0001)))
    assert found["rip"] == "0xffffffff80000001"
    assert found["type"] == "transition"
    assert (found["time_ns"], found["level"], found["to"], found["ran_ns"]) == (5000, 2, 1, 400)


@pytest.mark.parametrize(
    ("words", "step", "shown"),
    [
        ("level=2", Step(level=2), True),
        ("level=2", Step(level=1), False),
        ("level=L2", Step(level=2), True),
        ("vcpu=1|3", Step(vcpu=3), True),
        ("vcpu=1|3", Step(vcpu=2), False),
        ("reason=cpu", Step(reason="#VMEXIT(CPUID)"), True),
        ("reason=cpuid|hlt", Step(reason="HLT"), True),
        ("hlt", Step(reason="HLT"), True),
        ("hlt", Step(reason="CPUID"), False),
        ("level=2,to=1,reason=cpuid", Step(), True),
        ("level=2,to=2,reason=cpuid", Step(), False),
        ("action=inject", Step(action="inject #GP(0x0)"), True),
        ("detail=leaf 0x1", Step(), True),
    ],
)
def test_a_filter_shows_what_fits_all_of_its_terms(words, step, shown):
    assert parse_filter([words])(step) is shown


def test_filters_given_apart_must_all_fit():
    both = parse_filter(["level=2", "vcpu=1"])
    assert both(Step(vcpu=1))
    assert not both(Step(vcpu=0))


def test_no_filter_shows_everything():
    assert parse_filter([])(Step())


@pytest.mark.parametrize("words", ["", "level=two", "colour=red", "level=2,,vcpu=1", "vcpu="])
def test_a_filter_that_means_nothing_is_refused_in_one_line(words):
    with pytest.raises(BadInput) as caught:
        parse_filter([words])
    assert "\n" not in caught.value.message
    assert caught.value.hint
