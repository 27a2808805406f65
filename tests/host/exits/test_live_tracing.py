"""Live tracing on a tracefs of our own making: a folder with a pipe."""

import os
import threading

import pytest

from undervisor.errors import BadInput
from undervisor.host.exits import live
from undervisor.host.exits.attribute import Attribution, Whose
from undervisor.host.exits.trace import TRACEPOINTS, parse

LINE = "     CPU 0/KVM-41    [002] d..1. 100.5: {event}: vcpu 0 reason CPUID rip 0x1000\n"


@pytest.fixture
def tracefs(tmp_path, monkeypatch):
    """A tracefs whose new instances have events and a trace_pipe, as the kernel makes them."""
    (tmp_path / "instances").mkdir()
    (tmp_path / "events/kvm").mkdir(parents=True)
    make = os.mkdir

    def kernel(place, *mode):
        make(place, *mode)
        if os.path.dirname(str(place)) != str(tmp_path / "instances"):
            return
        for name in TRACEPOINTS[:-1]:  # an old kernel without the last one
            os.makedirs(f"{place}/events/kvm/{name}")
            with open(f"{place}/events/kvm/{name}/enable", "w") as file:
                file.write("0")
        os.mkfifo(f"{place}/trace_pipe")

    monkeypatch.setattr(live.os, "mkdir", kernel)
    monkeypatch.setattr(live, "TRACEFS", (str(tmp_path),))
    return tmp_path


def test_events_are_switched_on_and_counted_as_they_come(tracefs):
    attribution = Attribution()
    with live.instance(live.tracefs()) as place:
        for name in TRACEPOINTS[:-1]:
            with open(f"{place}/events/kvm/{name}/enable") as file:
                assert file.read() == "1"

        def kernel():
            with open(f"{place}/trace_pipe", "w") as pipe:
                for event in ("kvm_exit", "kvm_nested_vmexit", "kvm_entry"):
                    text = LINE.format(event=event)
                    pipe.write(text[:30])
                    pipe.flush()
                    pipe.write(text[30:])
                    pipe.flush()

        writer = threading.Thread(target=kernel)
        reader = live.lines(place, 0.6)
        writer.start()
        for lines in reader:
            attribution.feed(parse(lines))
        writer.join()
    assert attribution.finish().counts[Whose.L2_TO_L0] == {"CPUID": 1}


def test_without_tracefs_the_reason_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "TRACEFS", (str(tmp_path / "no"),))
    with pytest.raises(BadInput, match=r"tracing needs root|no KVM tracepoints"):
        live.tracefs()


def test_a_tracefs_that_refuses_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="cannot trace"), live.instance(str(tmp_path / "no")):
        pass
