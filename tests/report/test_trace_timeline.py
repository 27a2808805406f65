"""The timeline is a document that Chrome's and Perfetto's viewers read."""

import io
import json
from itertools import pairwise

from trace_things import Step

from undervisor.report.trace.timeline import EXIT_NS, Timeline


class Kept(io.StringIO):
    """A file whose text can be read after it was closed."""

    def close(self):
        self.text = self.getvalue()
        super().close()


def drawn(*steps, vcpus=1):
    file = Kept()
    timeline = Timeline(file, vcpus, "an image")
    for step in steps:
        timeline.add(step)
    timeline.close()
    return json.loads(file.text)["traceEvents"]


def boxes(events):
    return [event for event in events if event["ph"] == "X"]


def test_each_vcpu_is_a_process_with_a_lane_for_each_level():
    events = drawn(vcpus=2)
    names = {(e["pid"], e.get("tid")): e["args"].get("name") for e in events if e["ph"] == "M"}
    assert {pid for pid, _ in names} == {0, 1}
    assert [names[1, lane] for lane in (0, 1, 2)] == [
        "L0 undervisor",
        "L1 hypervisor",
        "L2 guest",
    ]


def test_the_guest_runs_on_its_level_until_the_exit_begins_on_that_of_l0():
    guest, exit = boxes(drawn(Step(time=5_000, ran=400, vcpu=0)))
    assert (guest["tid"], exit["tid"]) == (2, 0)
    assert (guest["ts"], guest["dur"]) == (3.6, 0.4)
    assert (exit["ts"], exit["dur"]) == (4.0, EXIT_NS / 1000)
    assert exit["name"] == "CPUID"
    assert exit["args"]["why"] == "L1 intercepts it"


def test_no_box_is_drawn_for_a_guest_that_did_not_run():
    assert [box["tid"] for box in boxes(drawn(Step(ran=0)))] == [0]


def test_boxes_of_one_lane_do_not_overlap():
    steps = [Step(time=2_000 * n, ran=900) for n in range(1, 20)]
    for lane in (0, 2):
        spans = [(b["ts"], b["ts"] + b["dur"]) for b in boxes(drawn(*steps)) if b["tid"] == lane]
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_an_empty_timeline_is_a_document_too():
    assert boxes(drawn()) == []
