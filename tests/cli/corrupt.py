"""Runs random corruptions of an example image, each in a child; prints what came of them.

A program of its own: `python corrupt.py VENDOR FIRST COUNT`.  It forks, so it holds no threads.
"""

import json
import os
import random
import sys

from guests import example

from undervisor.cli.child import run_in_child
from undervisor.errors import UndervisorError
from undervisor.targets import Job

SECONDS = 0.3
MEMORY = 64 << 20


def corrupted(data, seed):
    """`data` with some bytes changed, cut off or put elsewhere; mostly few, mostly in the code."""
    chance = random.Random(seed)
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16, 64))):
        place = chance.randrange(min(len(found), chance.choice((128, 4096, len(found)))))
        found[place] = chance.choice((0, 0xFF, chance.randrange(256), found[place] ^ 1))
    if chance.random() < 0.05:
        del found[chance.randrange(len(found)) :]
    return bytes(found)


def outcome(data, cpu):
    """The exit code of a run, or the one-line failure of it."""

    def work():
        from undervisor.cli import session
        from undervisor.guest.image import Image

        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        wishes = session.Wishes(cpu, serial="null", timeout=SECONDS, summary=False)
        image = Image.parse(data, "corrupted")
        return session.exit_code(session.show(Job(image, 2, MEMORY), wishes))

    try:
        return str(run_in_child(work, SECONDS))
    except UndervisorError as error:
        if not error.message or "\n" in error.message:
            raise RuntimeError(f"not a one-line message: {error.message!r}") from None
        return type(error).__name__


def main(vendor, first, count):
    import undervisor.cli.session  # before the forks, once for all of them

    assert undervisor.cli.session
    data, cpu = example(vendor).read_bytes(), {"svm": "amd", "vmx": "intel"}[vendor]
    found: dict[str, int] = {}
    for seed in range(first, first + count):
        try:
            name = outcome(corrupted(data, seed), cpu)
        except Exception as error:  # a bug of ours, which the test is to hear of
            name = f"BUG: seed {seed}: {error}"
        found[name] = found.get(name, 0) + 1
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
