"""A pytest plugin: test a hypervisor in its own suite, on an L0 that tells what it did.

    def test_my_hypervisor(undervisor):
        vm = undervisor.boot("my_hv.elf", cpu="intel", cpus=2)
        vm.expect("both processors are virtual")
        vm.assert_no_failed_entries()
        assert vm.run().status == 1

Each machine is a process of its own; a test that fails comes with the machine's last transitions,
broken rules, registers and serial output.  Nothing is imported before a test asks for a machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from undervisor.testing.fixture import Undervisor

MARKER = (
    "undervisor(cpu, cpus, memory, timeout): what the machines of the `undervisor` fixture are "
    "like: a CPU model or a list of them, a number of processors or a list, bytes, and seconds "
    "that the test's machines may run"
)
DEFAULT_CPU, DEFAULT_TIMEOUT, DEFAULT_LAST = "intel", 60.0, 40
_OPTIONS = ("cpu", "cpus", "memory", "timeout")
_USED = pytest.StashKey["Undervisor"]()


@dataclass(frozen=True, slots=True)
class Variant:
    """One of the machines that a test is run on."""

    cpu: str
    cpus: int


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options and the settings of the ini-file."""
    group = parser.getgroup("undervisor", "hypervisors under test, on the L0 of undervisor")
    group.addoption(
        "--undervisor-cpu",
        action="append",
        metavar="MODEL",
        help="CPU model for tests that name none; may be repeated, then they run on each",
    )
    group.addoption(
        "--undervisor-timeout",
        type=float,
        metavar="SECONDS",
        help=f"how long a test's machines may run where its marker says nothing "
        f"(default {DEFAULT_TIMEOUT:g})",
    )
    group.addoption(
        "--undervisor-trace",
        metavar="DIR",
        help="write every transition of each machine to a file there, and the whole report of "
        "each failure",
    )
    group.addoption(
        "--undervisor-last",
        type=int,
        default=DEFAULT_LAST,
        metavar="N",
        help="transitions that the report of a failure shows, repeated ones counted once "
        f"(default {DEFAULT_LAST})",
    )
    parser.addini("undervisor_cpu", "CPU models for tests that name none", "args", [])
    parser.addini("undervisor_timeout", "seconds that a test's machines may run", "string", "")


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", MARKER)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test is run once for each CPU model and number of processors, where there are several."""
    if "undervisor" not in metafunc.fixturenames:
        return
    wishes = _wishes(metafunc.definition)
    models, numbers = _models(metafunc.config, wishes), _list(wishes.get("cpus", 1))
    variants = [Variant(cpu, cpus) for cpu in models for cpus in numbers]
    if len(variants) > 1:
        names = [_name(v, len(models) > 1, len(numbers) > 1) for v in variants]
        metafunc.parametrize("undervisor", variants, indirect=True, ids=names)


def _name(variant: Variant, by_cpu: bool, by_number: bool) -> str:
    number = f"{variant.cpus}cpu" if variant.cpus == 1 else f"{variant.cpus}cpus"
    return "-".join([variant.cpu] * by_cpu + [number] * by_number)


def _wishes(node: Any) -> dict[str, Any]:
    """What the markers of a test say, the nearest first."""
    wishes: dict[str, Any] = {}
    for marker in node.iter_markers("undervisor"):
        unknown = set(marker.kwargs) - set(_OPTIONS)
        if unknown or marker.args:
            raise pytest.UsageError(
                f"{node.nodeid}: @pytest.mark.undervisor takes {', '.join(_OPTIONS)} by name, not "
                f"{', '.join([*sorted(unknown), *map(repr, marker.args)])}"
            )
        wishes = {**marker.kwargs, **wishes}
    return wishes


def _models(config: pytest.Config, wishes: dict[str, Any]) -> list[str]:
    """The marker's models, or the command line's, or the ini-file's."""
    given = (
        _list(wishes.get("cpu", []))
        or config.getoption("--undervisor-cpu")
        or config.getini("undervisor_cpu")
    )
    return list(given) or [DEFAULT_CPU]


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _timeout(config: pytest.Config, wishes: dict[str, Any]) -> float:
    given = config.getini("undervisor_timeout") or DEFAULT_TIMEOUT
    option = config.getoption("--undervisor-timeout")
    try:
        return float(wishes.get("timeout", given if option is None else option))
    except ValueError:
        raise pytest.UsageError(f"undervisor_timeout = {given}: seconds are wanted") from None


@pytest.fixture
def undervisor(request: pytest.FixtureRequest) -> Iterator[Undervisor]:
    """An L0 for this test: `undervisor.boot(image, cpu=..., cpus=...)` gives a machine.

    The machines end with the test.
    """
    from undervisor.testing.fixture import Undervisor

    config, wishes = request.config, _wishes(request.node)
    variant = getattr(request, "param", None) or Variant(
        _models(config, wishes)[0], _list(wishes.get("cpus", 1))[0]
    )
    made = Undervisor(
        test=request.node.nodeid,
        cpu=variant.cpu,
        cpus=variant.cpus,
        memory=wishes.get("memory", 0),
        timeout=_timeout(config, wishes),
        traces=config.getoption("--undervisor-trace"),
    )
    request.node.stash[_USED] = made
    yield made
    made.close()


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Attach the machines of a test that failed."""
    outcome = yield
    report: pytest.TestReport = outcome.get_result()
    used = item.stash.get(_USED, None)
    if used is None or not report.failed or report.when == "teardown":
        return
    for vm in used.vms:
        try:
            words = used.report(vm, item.config.getoption("--undervisor-last"))
        except Exception as error:  # what hides the test's own failure would be worse
            words = f"no report: {type(error).__name__}: {error}"
        _attach(report, f"undervisor: {vm.boot}", words)


def _attach(report: pytest.TestReport, title: str, words: str) -> None:
    """A section of the failure itself: that also goes into JUnit files, and no option hides it."""
    failure: Any = report.longrepr
    if hasattr(failure, "addsection"):
        failure.addsection(title, words)
    else:
        report.sections.append((title, words))
