"""Whatever comes in: an answer or one clear sentence, in bounded time and memory."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from undervisor.errors import BadInput
from undervisor.explain import read
from undervisor.explain.diagnosis import first_with_findings
from undervisor.explain.report import diagnosis_data

DUMPS = Path(__file__).parent / "dumps"
SEEDS = [path.read_bytes() for path in sorted(DUMPS.iterdir()) if path.name != "expected.json"]
SECONDS = 5.0


def cut(rng, raw):
    return raw[: rng.randrange(len(raw))]


def behead(rng, raw):
    return raw[rng.randrange(len(raw)) :]


def noise(rng, raw):
    out = bytearray(raw)
    for _ in range(rng.randrange(1, 60)):
        out[rng.randrange(len(out))] = rng.randrange(256)
    return bytes(out)


def insert(rng, raw):
    place = rng.randrange(len(raw))
    return raw[:place] + rng.randbytes(rng.randrange(1, 400)) + raw[place:]


def huge_number(rng, raw):
    place = rng.randrange(len(raw))
    digits = rng.choice([b"f", b"9", b"0x7"]) * rng.choice([17, 100, 5000])
    return raw[:place] + b"=" + digits + raw[place:]


def encoding(rng, raw):
    codec = rng.choice(["utf-16", "utf-32", "latin-1", "utf-7"])
    return raw.decode("latin-1").encode(codec)


def shuffle(rng, raw):
    rows = raw.split(b"\n")
    rng.shuffle(rows)
    return b"\n".join(rows)


def repeat(rng, raw):
    return raw * rng.randrange(2, 6)


def mix(rng, raw):
    other = rng.choice(SEEDS)
    return raw[: rng.randrange(len(raw))] + other[rng.randrange(len(other)) :]


def long_line(rng, raw):
    return raw.replace(b"\n", b" ", rng.randrange(1, 30)) + b"A" * 50_000


def zeros(rng, raw):
    return raw.replace(b"0", b"\0", rng.randrange(1, 50))


def deep_json(rng, raw):
    return b'{"a":' * rng.choice([5, 100, 100_000]) + raw[:100]


WAYS = (
    cut,
    behead,
    noise,
    insert,
    huge_number,
    encoding,
    shuffle,
    repeat,
    mix,
    long_line,
    zeros,
    deep_json,
)


def corrupted(seed):
    rng = random.Random(seed)
    raw = rng.choice(SEEDS)
    for _ in range(rng.choice([1, 1, 2, 3])):
        raw = rng.choice(WAYS)(rng, raw) or b"x"
    return raw


def answer(raw):
    """An answer, or the sentence of a refusal; anything else escapes and fails the test."""
    try:
        dumps = read(raw)
    except BadInput as error:
        return str(error)
    return diagnosis_data(first_with_findings(dumps, None), len(dumps))


def hold(seeds):
    refused = 0
    for seed in seeds:
        before = time.process_time()
        told = answer(corrupted(seed))
        refused += isinstance(told, str)
        assert not isinstance(told, str) or (told and "\n" not in told)
        assert time.process_time() - before < SECONDS, f"seed {seed}"
    return refused


def test_three_hundred_corruptions_give_answers_or_sentences():
    refused = hold(range(300))
    assert 0 < refused < 300


@pytest.mark.deep
@pytest.mark.parametrize("part", range(10))
def test_ten_thousand_corruptions_give_answers_or_sentences(part):
    hold(range(1000 + part * 1000, 2000 + part * 1000))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0",
        b"\n\n",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"\x1b[0m",
        b"hello",
        b"=" * 1000,
        bytes(4096),
        bytes(128),
        b"\0" * 8320,
        b"VMFAIL",
        b"*** Guest State ***",
        b"KVM: entry failed",
    ],
)
def test_small_oddities_are_refused_or_answered(raw):
    answer(raw)


BIG = """
import resource, sys
from undervisor.cli.main import main
resource.setrlimit(resource.RLIMIT_AS, (700 << 20, 700 << 20))
main(["explain", "-", "--json"])
"""


def through_a_pipe(pieces):
    """Run the verb on a long input with little memory; its exit code and output."""
    process = subprocess.Popen(
        [sys.executable, "-c", BIG],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        for piece in pieces:
            process.stdin.write(piece)
    except BrokenPipeError:
        pass
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err.decode()


LINE = b"[12345.678901] eth0: link becomes ready, everything is fine here and will be so\n"


def test_a_hundred_megabytes_without_a_dump_are_refused_in_bounded_time_and_memory():
    started = time.monotonic()
    code, _, err = through_a_pipe([LINE * 12_800] * 100)
    assert (code, "Traceback" in err) == (2, False)
    assert time.monotonic() - started < 30


def test_a_dump_in_the_middle_of_a_hundred_megabytes_is_found():
    dump = (DUMPS / "kvm-4-cs-dpl.txt").read_bytes()
    code, out, _ = through_a_pipe([*[LINE * 12_800] * 50, dump, *[LINE * 12_800] * 50])
    assert code == 1
    assert b"vmx.guest.cs.dpl" in out


def test_a_hundred_megabytes_of_digits_on_one_line_are_bounded():
    code, _, err = through_a_pipe([b"VMFAIL" + b"f" * (1 << 20)] * 100)
    assert code in (1, 2)
    assert "Traceback" not in err


SIZE = 2 << 20
REPEATED = {
    "letters": "a" * 1999 + "\n",
    "words": "ab cd.ef " * 200 + "\n",
    "pairs": "a = 1 " * 300 + "\n",
    "digits": "0" * 1999 + "\n",
    "titles": "*** Guest State ***\nCR3 = 0x1\n",
    "brackets": "RIP = 0x1 (" + "x" * 150 + ")\n",
    "registers": "CR0: actual= " + "0" * 1900 + "\n",
    "failures": "VMENTER FAIL: " + "guest " * 25 + "\n",
    "code": "KVM internal error. Suberror: 1\nCode=" + "ff " * 600 + "\n",
    "vmcbs": "VMCB Control Area:\n asid: 0\nefer: 0\ncr0: 0\ncr3: 0\n",
    "objects": '{"a":',
    "statuses": "VERR_VMX_" + "A" * 70 + " \n",
}


@pytest.mark.parametrize("kind", REPEATED)
def test_two_megabytes_made_to_be_slow_are_not(kind):
    raw = (REPEATED[kind] * (SIZE // len(REPEATED[kind]) + 1))[:SIZE].encode()
    before = time.process_time()
    answer(raw)
    assert time.process_time() - before < SECONDS
