"""`undervisor run`: an L1 image on the built-in L0."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from undervisor.cli import terminal
from undervisor.cli.child import run_in_child
from undervisor.errors import BadInput

if TYPE_CHECKING:
    from undervisor.guest.image import Image

_SIZE: Final = re.compile(r"(\d{1,12})\s*([KMG]?)(?:i?B)?", re.IGNORECASE | re.ASCII)
_UNITS: Final = {"": 20, "K": 10, "M": 20, "G": 30}
LARGEST_FILE: Final = 1 << 30
LONGEST: Final = 366 * 86400.0
REAL_MODE_END: Final = 0x100000

ImageArgument = Annotated[
    str, typer.Argument(help="The L1: Multiboot, PVH, a Linux kernel, or a flat binary (--raw).")
]
CpuOption = Annotated[
    str, typer.Option("--cpu", help="CPU model: intel, amd, intel-haswell,+feature,-feature ...")
]
MemoryOption = Annotated[str, typer.Option("--memory", help="RAM: 256M, 1G; a number is MiB.")]
TimeoutOption = Annotated[float | None, typer.Option("--timeout", help="Seconds of host time.")]


def run(
    image: ImageArgument,
    cpu: CpuOption = "intel",
    cpus: Annotated[int, typer.Option("--cpus", help="Processors, 1 to 8.")] = 1,
    memory: MemoryOption = "256M",
    append: Annotated[str, typer.Option("--append", help="The command line.")] = "",
    module: Annotated[
        list[str] | None,
        typer.Option("--module", help="FILE or 'FILE arguments'; may be repeated."),
    ] = None,
    serial: Annotated[
        str, typer.Option("--serial", help="The serial port: stdio, file:PATH or null.")
    ] = "stdio",
    raw: Annotated[
        str,
        typer.Option("--raw", help="Load a flat binary here; below 1 MiB it starts in real mode."),
    ] = "",
    timeout: TimeoutOption = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Print each transition between the levels.")
    ] = False,
    trace_filter: Annotated[
        list[str] | None,
        typer.Option("--trace-filter", help="level=2,reason=cpuid|hlt,vcpu=0,to=1,action=inject"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Everything on stdout, as JSON documents by line.")
    ] = False,
    timeline: Annotated[
        str,
        typer.Option(
            "--timeline", help="Write a Chrome trace, for ui.perfetto.dev; a picture, FILE.svg."
        ),
    ] = "",
    summary: Annotated[
        bool, typer.Option("--summary/--no-summary", help="The tree of levels and exits.")
    ] = True,
) -> None:
    """Run an L1 hypervisor and its L2 guests on the built-in L0.

    The guest's serial port is stdin and stdout; trace and summary go to stderr. The exit code is
    the guest's where it ends the run: (value << 1) | 1 for a write of `value` to port 0xf4.
    """
    if timeout is not None and not 0 < timeout <= LONGEST:
        raise BadInput(f"--timeout {timeout:g}", hint="seconds, more than 0 and at most a year")
    check_cpus(cpus)
    size = parse_size(memory)
    files = [_module(words) for words in module or []]
    data = read_file(image)

    def work() -> int:
        from undervisor.cli import session  # in the child only: this is the heavy part
        from undervisor.guest.image import Module
        from undervisor.report.trace.transition import parse_filter
        from undervisor.targets import Job

        modules = tuple(Module(name, content, words) for name, content, words in files)
        job = Job(_parse(data, image, raw), cpus, size, append, modules)
        wishes = session.Wishes(
            cpu=cpu,
            serial=serial,
            timeout=timeout,
            trace=trace or bool(trace_filter),
            accepts=parse_filter(trace_filter or []),
            as_json=as_json,
            timeline=timeline,
            summary=summary,
        )
        return session.exit_code(session.show(job, wishes))

    with terminal.raw_keys(wanted=serial == "stdio"):
        code = run_in_child(work, timeout)
    raise typer.Exit(code)


def _parse(data: bytes, name: str, raw: str) -> Image:
    """The image, by its own headers or as a flat binary."""
    from undervisor.arch.x86.boot import BootMode
    from undervisor.guest.image import Image

    if not raw:
        return Image.parse(data, name)
    address = parse_address(raw)
    mode = BootMode.REAL if address < REAL_MODE_END else BootMode.PROTECTED32
    return Image.raw(data, name, address, mode)


def check_cpus(cpus: int) -> None:
    """BadInput for a number of processors that no machine of ours has."""
    if not 1 <= cpus <= 8:
        raise BadInput(f"--cpus {cpus}", hint="1 to 8 processors are possible")


def parse_size(text: str) -> int:
    """Bytes: `256M`, `1G`, `4096K`; a number alone counts MiB."""
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise BadInput(f"--memory {text!r}", hint="for example 256M or 1G")
    return int(found[1]) << _UNITS[found[2].upper()]


def parse_address(text: str) -> int:
    """A guest-physical address, decimal or 0x..."""
    with contextlib.suppress(ValueError):
        address = int(text, 0)
        if 0 <= address < 1 << 32:
            return address
    raise BadInput(f"--raw {text!r}", hint="an address below 4 GiB, for example 0x7c00")


def read_file(path: str) -> bytes:
    """The whole file; BadInput where it is no readable regular file of a sensible size."""
    where = Path(path)
    try:
        if where.exists() and not where.is_file():
            raise BadInput(f"{path}: not a regular file")
        with where.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInput(f"cannot read {path}: {reason}") from None
    if len(data) > LARGEST_FILE:
        raise BadInput(f"{path}: larger than {LARGEST_FILE >> 30} GiB")
    return data


def _module(text: str) -> tuple[str, bytes, str]:
    """(name, content, command line) of `FILE arguments`."""
    path, _, words = text.partition(" ")
    return path, read_file(path), words
