"""`undervisor demo`: both example hypervisors, four processors each, on the built-in L0."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Final

import typer

from undervisor.cli.child import run_in_child
from undervisor.cli.run import check_cpus
from undervisor.errors import ExitCode, UndervisorError

PASSED: Final = 1  # (0 << 1) | 1: the example wrote 0 to the debug exit port
LIMIT: Final = 60.0
ROWS: Final = 12


@dataclass(frozen=True, slots=True)
class Example:
    """An example that the package carries."""

    vendor: str
    cpu: str
    what: str


EXAMPLES: Final = (
    Example("svm", "amd", "AMD SVM"),
    Example("vmx", "intel", "Intel VMX"),
)


def demo(
    cpus: Annotated[int, typer.Option("--cpus", help="Processors of each, 1 to 8.")] = 4,
) -> None:
    """Run the example L1 hypervisors with their L2 guests and show what happened.

    Each starts its processors, moves every one of them into an L2 of its own, and handles what
    the L2s do. Exit code 0: both passed. 1: one did not.
    """
    check_cpus(cpus)
    good = [_run(number, example, cpus) for number, example in enumerate(EXAMPLES, 1)]
    raise typer.Exit(ExitCode.OK if all(good) else ExitCode.NEGATIVE)


def _run(number: int, example: Example, cpus: int) -> bool:
    """Whether an example passed."""
    started = time.monotonic()
    print(
        f"[{number}/{len(EXAMPLES)}] L0 undervisor -> L1 {example.vendor}.elf ({example.what}) "
        f"on {cpus} vCPUs -> L2",
        flush=True,
    )
    try:
        status = run_in_child(lambda: _work(example, cpus), LIMIT)
    except UndervisorError as error:
        print(f"undervisor: {error.message}", file=sys.stderr)
        status = error.exit_code
    word = "passed" if status == PASSED else f"FAILED, exit code {status}"
    print(f"{example.what}: {word} in {time.monotonic() - started:.1f} s\n", flush=True)
    return status == PASSED


def _work(example: Example, cpus: int) -> int:
    from undervisor.cli import session
    from undervisor.guest.image import Image
    from undervisor.targets import Job

    name = f"{example.vendor}.elf"
    data = (resources.files("undervisor") / "data" / "examples" / name).read_bytes()
    job = Job(Image.parse(data, name), cpus)
    wishes = session.Wishes(cpu=example.cpu, timeout=LIMIT, summary_to_stdout=True, rows=ROWS)
    return session.exit_code(session.show(job, wishes))
