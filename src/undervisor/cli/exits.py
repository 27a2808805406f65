"""`undervisor exits`: what exits, how often, and whose exits they are."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from undervisor.cli.check import HostOption, JsonOption, SshConfigOption
from undervisor.errors import BadInput, ExitCode
from undervisor.host.access.opening import open_host
from undervisor.host.exits import live, remote
from undervisor.host.exits.attribute import Attribution, Tally
from undervisor.host.exits.stats import debugfs_counters, parse_binary
from undervisor.host.exits.trace import parse
from undervisor.host.fact import Fact, Known
from undervisor.report.exits import remarks, table


def exits(
    trace: Annotated[
        str, typer.Argument(help="Text of `trace-cmd report` or `perf script`; - reads stdin.")
    ] = "",
    seconds: Annotated[float, typer.Option(help="How long to watch the machine.")] = 10.0,
    stats: Annotated[
        bool, typer.Option("--stats", help="KVM's counters instead of tracepoints.")
    ] = False,
    stats_file: Annotated[
        str, typer.Option("--stats-file", help="A file read from KVM_GET_STATS_FD.")
    ] = "",
    host: HostOption = "",
    ssh_config: SshConfigOption = "",
    as_json: JsonOption = False,
) -> None:
    """Count VM exits by reason, attributed to L1, to L2 handled by L0, and to L2 reflected to L1.

    L0 is the machine that is looked at, whatever is below it.
    To record elsewhere: trace-cmd record -e kvm:kvm_entry -e kvm:kvm_exit -e 'kvm:kvm_nested*'
    """
    if not 0 < seconds <= 86400:
        raise BadInput(f"{seconds} seconds", hint="more than 0, at most a day")
    if host and (trace or stats_file):
        raise BadInput("a file and --host name two sources", hint="give one of them")
    if stats_file:
        _show_file(stats_file, as_json)
    elif stats:
        _show_counters(host, ssh_config, seconds, as_json)
    else:
        tally = _from_text(trace) if trace else _trace(host, ssh_config, seconds, as_json)
        _show(tally, as_json)
    raise typer.Exit(ExitCode.OK)


def _from_text(path: str) -> Tally:
    attribution = Attribution()
    if path == "-":
        attribution.feed(parse(_bounded(sys.stdin)))
    else:
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                attribution.feed(parse(_bounded(file)))
        except OSError as error:
            raise BadInput(f"cannot read {path}: {error.strerror}") from error
    tally = attribution.finish()
    if not tally.vcpus:
        raise BadInput(
            f"no KVM event in {path}",
            hint="give the text of `trace-cmd report` or `perf script`, not the binary file",
        )
    return tally


def _bounded(file: object) -> Iterator[str]:
    """Lines, a very long one in pieces, so that a file without newlines is harmless."""
    read = file.readline  # type: ignore[attr-defined]
    while line := read(1 << 16):
        yield line


def _trace(name: str, ssh_config: str, seconds: float, as_json: bool) -> Tally:
    """Trace now, here or there."""
    with ExitStack() as ends:
        if not name:
            place = ends.enter_context(live.instance(live.tracefs()))
            return _watch(live.lines(place, seconds), as_json)
        host = open_host(host=name, ssh_config=ssh_config)
        ends.callback(host.close)
        place = ends.enter_context(remote.instance(host, remote.tracefs(host), seconds))
        batches = ends.enter_context(closing(remote.lines(host, place, seconds)))
        return _watch(batches, as_json)


def _watch(batches: Iterable[list[str]], as_json: bool) -> Tally:
    """Count what comes; a table that updates unless JSON was asked for."""
    attribution = Attribution(nested_recorded=True)
    with ExitStack() as ends:
        screen = None if as_json else ends.enter_context(_screen())
        for lines in batches:
            attribution.feed(parse(lines))
            if screen:
                screen.update(table(attribution.tally))
    return attribution.finish()


def _screen() -> Live:
    """Where the table updates; what is shown at the end takes its place."""
    return Live(Table(), console=Console(), refresh_per_second=4, transient=True)


def _show(tally: Tally, as_json: bool) -> None:
    if as_json:
        json.dump(tally.as_json(), sys.stdout, indent=2)
        print()
        return
    console = Console()
    console.print(table(tally))
    for line in remarks(tally):
        console.print(f"- {line}", highlight=False)


def _show_counters(name: str, ssh_config: str, seconds: float, as_json: bool) -> None:
    host = open_host(host=name, ssh_config=ssh_config)
    try:
        before = _known(debugfs_counters(host))
        time.sleep(seconds)
        after = _known(debugfs_counters(host))
    finally:
        host.close()
    rates = {
        name: (after[name] - count) / seconds for name, count in before.items() if name in after
    }
    if as_json:
        json.dump({"seconds": seconds, "totals": after, "per_second": rates}, sys.stdout)
        print()
        return
    found = Table("counter", "total", "per second")
    for name, rate in sorted(rates.items(), key=lambda item: -item[1]):
        found.add_row(name, f"{after[name]:,}", f"{rate:,.1f}")
    Console().print(found)


def _known(counters: Fact[dict[str, int]]) -> dict[str, int]:
    if not isinstance(counters, Known):
        raise BadInput(str(counters))
    return counters.value


def _show_file(path: str, as_json: bool) -> None:
    try:
        with open(path, "rb") as file:
            raw = file.read((1 << 20) + 1)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error
    name, counters = parse_binary(raw)
    if as_json:
        values = {c.name: list(c.values) for c in counters}
        json.dump({"id": name, "statistics": values}, sys.stdout, indent=2)
        print()
        return
    found = Table("statistic", "value", "unit", "kind", title=name, title_justify="left")
    for counter in counters:
        text = " ".join(f"{value:,}" for value in counter.values[:16])
        found.add_row(counter.name, text, counter.unit, counter.kind)
    Console().print(found)
