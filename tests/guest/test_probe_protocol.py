import random
import struct
import time

import pytest

from undervisor.guest.image import Image, Protocol
from undervisor.guest.probe.answers import Answer, Fault, Faulted, Refused, VmxOutcome
from undervisor.guest.probe.batch import HEADER, resolve
from undervisor.guest.probe.client import Batch, Probe, ProbeDied, ProbeSilent
from undervisor.guest.probe.program import BASE, BLOCKS, FREE, PAGE_TABLES, program
from undervisor.guest.probe.protocol import SYNC, Decoder, Frame, Kind, Status


def test_a_frame_survives_the_line():
    frame = Frame(Kind.RESPONSE, 7, b"payload")
    assert Decoder().feed(frame.encode()) == [frame]


def test_a_frame_may_arrive_byte_by_byte():
    frame, decoder = Frame(Kind.HELLO, 0, b"12345678"), Decoder()
    found = [f for byte in frame.encode() for f in decoder.feed(bytes([byte]))]
    assert found == [frame]


def test_frames_are_found_between_rubbish():
    rng, decoder = random.Random(1), Decoder()
    frames = [Frame(Kind.RESPONSE, n, rng.randbytes(n)) for n in range(50)]
    sync = SYNC.to_bytes(4, "little")
    found = []
    for frame in frames:
        found += decoder.feed(rng.randbytes(rng.randint(0, 40)) + sync[: rng.randint(0, 4)])
        found += decoder.feed(frame.encode())
    # A false header may hold a frame back until its length has arrived, never lose it.
    found += decoder.feed(bytes(70000))
    assert found == frames


@pytest.mark.parametrize("at", range(0, 30, 3))
def test_a_damaged_frame_is_skipped_and_the_next_is_found(at):
    damaged = bytearray(Frame(Kind.RESPONSE, 1, b"0123456789").encode())
    damaged[at] ^= 0x10
    good = Frame(Kind.RESPONSE, 2, b"good")
    assert Decoder().feed(bytes(damaged) + good.encode() + bytes(70000)) == [good]


def test_the_decoder_keeps_little_of_endless_noise():
    decoder = Decoder()
    for _ in range(100):
        decoder.feed(b"\xaa" * 10000)
    assert decoder.noise_size >= 999_990
    assert len(decoder.noise) == Decoder.NOISE_KEPT
    assert len(decoder._data) < 4


class Script:
    """A line that plays back what a probe would say."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.sent = []

    def send(self, data):
        self.sent.append(data)

    def receive(self, timeout):
        if not self.answers:
            time.sleep(min(timeout, 0.01))
            return b""
        answer = self.answers.pop(0)
        if answer is EOFError:
            raise EOFError
        return answer


def record(status, data):
    return HEADER.pack(0, status, len(data)) + data


def hello(build):
    return Frame(Kind.HELLO, 0, struct.pack("<2I", build, 0x2BADB002)).encode()


def test_hello_comes_after_the_bios_has_spoken():
    probe = Probe(Script(b"SeaBIOS 1.16\r\nBooting\r\n", hello(program().build)))
    probe.wait_for_hello()
    assert probe.booted_by_multiboot


def test_another_build_is_refused():
    with pytest.raises(ProbeDied, match="build 0x1, not"):
        Probe(Script(hello(1))).wait_for_hello()


def test_a_request_that_arrived_damaged_is_sent_again():
    answer = Frame(Kind.RESPONSE, 1, record(Status.OK, struct.pack("<2Q", 2, 42)))
    line = Script(Frame(Kind.NAK, 1, b"").encode(), answer.encode())
    batch = Batch()
    value = batch.read_cr(4)
    Probe(line).run(batch)
    assert value.value == 42
    assert len(line.sent) == 2
    assert line.sent[0] == line.sent[1]


def test_a_line_that_damages_everything_is_given_up():
    batch = Batch()
    batch.cpuid(0)
    with pytest.raises(ProbeDied, match="reached the probe damaged"):
        Probe(Script(*[Frame(Kind.NAK, 1, b"").encode()] * 9)).run(batch)


def test_an_old_answer_is_not_taken_for_the_new():
    old = Frame(Kind.RESPONSE, 9, record(Status.OK, struct.pack("<2Q", 2, 1)))
    new = Frame(Kind.RESPONSE, 1, record(Status.OK, struct.pack("<2Q", 2, 2)))
    batch = Batch()
    value = batch.read_cr(4)
    Probe(Script(old.encode() + new.encode())).run(batch)
    assert value.value == 2


ENDS = {
    "silence": ([b"half a mess"], ProbeSilent, "no answer in 0.2 s; last heard: half a mess"),
    "the machine's end": ([b"triple fault", EOFError], ProbeDied, "last heard: triple fault"),
    "a flood": ([b"\xff" * 65536] * 40, ProbeDied, "speaks rubbish"),
    "half an answer": (
        [Frame(Kind.RESPONSE, 1, bytes(99)).encode()[:50]],
        ProbeSilent,
        "no answer",
    ),
    "a second start": ([hello(1)], ProbeDied, "started again"),
    "a panic": (
        [Frame(Kind.PANIC, 1, struct.pack("<6Q", 14, 2, 0x100123, 8, 0x207000, 0xBAD)).encode()],
        ProbeDied,
        "exception 14, error code 0x2, RIP 0x100123",
    ),
}


@pytest.mark.parametrize("end", ENDS, ids=str)
def test_a_machine_that_fails_is_reported(end):
    answers, error, words = ENDS[end]
    batch = Batch()
    batch.cpuid(0)
    with pytest.raises(error, match=words):
        Probe(Script(*answers), answer_time=0.2).run(batch)


def test_a_fault_is_a_value_with_the_processors_account():
    batch = Batch()
    value = batch.rdmsr(0x1234)
    data = struct.pack("<9Q", 13, 0, 0x100800, 8, 0x207FF0, 0, 0x10002, 7, 8)
    resolve(batch.requests, record(Status.FAULT, data))
    fault = value.fault
    assert (fault.vector, fault.rip, fault.registers) == (13, 0x100800, {"rax": 7, "rdx": 8})
    with pytest.raises(Faulted, match=r"RDMSR 0x1234: exception 13 \(error code 0x0\) at 0x100800"):
        _ = value.value


def test_an_operation_without_an_answer_was_not_run():
    batch = Batch()
    first, second = batch.read_cr(4), batch.read_cr(3)
    resolve(batch.requests, record(Status.OK, struct.pack("<2Q", 2, 5)))
    assert first.value == 5
    assert isinstance(second.outcome, Refused)


def test_an_answer_before_its_batch_ran_is_refused():
    with pytest.raises(Faulted, match="read_cr4 was not run"):
        _ = Batch().read_cr(4).value
    assert Answer("x").what == "x"


@pytest.mark.parametrize(
    ("rflags", "outcome", "error"),
    [
        (0x02, VmxOutcome.SUCCEED, 0),
        (0x03, VmxOutcome.FAIL_INVALID, 0),
        (0x42, VmxOutcome.FAIL_VALID, 13),
    ],
)
def test_the_flags_of_a_vmx_instruction_are_its_outcome(rflags, outcome, error):
    batch = Batch()
    answer = batch.vmptrld(0x400000)
    resolve(batch.requests, record(Status.OK, struct.pack("<2Q", rflags, 13)))
    assert (answer.value.outcome, answer.value.error) == (outcome, error)


def test_a_large_batch_goes_over_in_portions():
    batch = Batch()
    answers = [batch.read(0x400000, 0x7000) for _ in range(5)]
    pages = [Frame(Kind.RESPONSE, n, record(0, bytes(0x7000)) * 2) for n in (1, 2)]
    last = Frame(Kind.RESPONSE, 3, record(0, bytes(0x7000)))
    line = Script(*[f.encode() for f in (*pages, last)])
    Probe(line).run(batch)
    assert len(line.sent) == 3
    assert all(len(answer.value) == 0x7000 for answer in answers)


def test_what_no_frame_can_hold_is_refused_at_once():
    with pytest.raises(ValueError, match="too many for one operation"):
        Batch().read(0, 0x10000)
    with pytest.raises(ValueError, match="too many for one operation"):
        Batch().write(0, bytes(0x8000))
    with pytest.raises(ValueError, match="inline code"):
        Batch().call(bytes(0x1000))


def test_the_program_leaves_its_tables_and_blocks_alone():
    image = Image.parse(program().elf, "probe")
    assert image.protocol is Protocol.MULTIBOOT
    assert BASE + len(program().code) < PAGE_TABLES < BLOCKS < FREE
    assert image.kernel.end == FREE


def test_a_fault_is_never_mistaken_for_a_value():
    fault = Fault(6, 0, 0, 8, 0, 0, 2, {})
    answer = Answer("an operation")
    answer.set(fault)
    assert answer.outcome is fault
