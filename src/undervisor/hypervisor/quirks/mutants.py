"""Mutants: single random changes of the nested code, to see how many the conformance suite finds.

A mutant flips one comparison, condition, operator or number, drops one assignment of a field, or
switches one rule of VM entry off.  `mutant(number)` is a quirk: the L0 of this process changes for
good, before its machine is built, so that a mutant belongs into a process of its own.

What no L1 can see says nothing about a test suite: `equivalents` has such changes, with reasons.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Final

from undervisor.arch.svm import checks as svm_checks
from undervisor.arch.vmx import checks as vmx_checks
from undervisor.errors import BadInput
from undervisor.hypervisor.quirks.equivalents import EQUIVALENT, breakable_rules
from undervisor.hypervisor.quirks.quirk import Quirk

if TYPE_CHECKING:
    from undervisor.hypervisor.models import CpuModel

PREFIX: Final = "mutant-"
_PACKAGE: Final = "undervisor.hypervisor.nested"
MODULES: Final[dict[str, tuple[str, ...]]] = {
    "vmx": (
        "", "apic", "controls", "entry", "events", "exit", "functions", "information",
        "instructions", "msr_lists", "paging", "permissions", "reflect", "state", "timers",
        "usual", "virtual_interrupts",
    ),
    "svm": (
        "", "controls", "entry", "events", "exit", "guest", "information", "instructions",
        "paging", "permissions", "reflect", "state",
    ),
}  # fmt: skip
_NEUTRAL: Final[dict[type[ast.operator], int]] = {
    ast.BitOr: 0,
    ast.BitAnd: -1,
    ast.Add: 0,
    ast.Sub: 0,
}
# What L1 cannot see: the words of the trace, and what is kept only to be quick.
_UNSEEN: Final = frozenset({"reason", "last", "failure", "broken", "_all", "_good"})
_SKIPPED: Final = frozenset({"__init__", "__repr__", "__str__", "reason", "make_room"})

_COMPARISONS: Final[dict[type[ast.cmpop], type[ast.cmpop]]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_OPERATORS: Final[dict[type[ast.operator], type[ast.operator]]] = {
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change: `where` says it to a person, `vendor` whose tests it concerns."""

    number: int
    vendor: str
    where: str
    change: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Site:
    """A place in a function's source: the change of one node of its tree."""

    function: ast.FunctionDef
    node: ast.AST
    what: str
    change: Callable[[ast.AST], None]

    def key(self, module: str) -> tuple[str, str]:
        """What `EQUIVALENT` knows it by."""
        return f"{module}.{self.function.name}", self.what


def mutant(name: str) -> Quirk:
    """The mutant `mutant-N` as a quirk; BadInput where there is no such number."""
    number = name.removeprefix(PREFIX)
    known = all_mutants()
    if not number.isdecimal() or int(number) >= len(known):
        raise BadInput(f"there is no {name}", hint=f"{PREFIX}0 to {PREFIX}{len(known) - 1}")
    found = known[int(number)]

    def change(model: CpuModel) -> CpuModel:
        found.change()
        return model

    return Quirk(name, found.where, "a random change", model=change)


def sample(count: int, seed: int = 0) -> list[Mutant]:
    """`count` different mutants, the same ones for the same seed."""
    known = all_mutants()
    return random.Random(seed).sample(known, min(count, len(known)))


@lru_cache(maxsize=1)
def all_mutants() -> tuple[Mutant, ...]:
    """Every mutant, in an order that does not depend on anything but the source."""
    found: list[tuple[str, str, Callable[[], None]]] = []
    for vendor, module in _modules():
        found += [(vendor, where, change) for where, change in _of_module(module)]
    breakable = breakable_rules()
    for vendor, rules in (("vmx", vmx_checks.RULES), ("svm", svm_checks.RULES)):
        mine = [rule for rule in rules if rule.id in breakable]
        found += [(vendor, f"rule {r.id} always holds", _switch_off(r)) for r in mine]
    return tuple(Mutant(number, *row) for number, row in enumerate(found))


def all_keys() -> set[tuple[str, str]]:
    """Every change of a function, as `EQUIVALENT` would name it."""
    return {
        site.key(_short(module))
        for _, module in _modules()
        for site in _sites(ast.parse(inspect.getsource(module)))
    }


def _modules() -> Iterator[tuple[str, ModuleType]]:
    for vendor, names in MODULES.items():
        for name in names:
            where = f"{_PACKAGE}.{vendor}.{name}".rstrip(".")
            yield vendor, importlib.import_module(where)


def _short(module: ModuleType) -> str:
    return module.__name__.removeprefix("undervisor.hypervisor.")


def _switch_off(rule: Any) -> Callable[[], None]:
    def change() -> None:
        object.__setattr__(rule, "holds", lambda state, capabilities: True)

    return change


# -- functions ----------------------------------------------------------------------------------


def _of_module(module: ModuleType) -> Iterator[tuple[str, Callable[[], None]]]:
    source = inspect.getsource(module)
    short = _short(module)
    for index, site in enumerate(_sites(ast.parse(source))):
        if site.key(short) in EQUIVALENT:
            continue
        line = getattr(site.node, "lineno", site.function.lineno)
        where = f"{short}:{line} {site.function.name}: {site.what}"
        yield where, _patch(module, source, index)


def _patch(module: ModuleType, source: str, index: int) -> Callable[[], None]:
    def change() -> None:
        tree = ast.parse(source)
        site = next(s for i, s in enumerate(_sites(tree)) if i == index)
        site.change(site.node)
        compiled = compile(ast.fix_missing_locations(tree), module.__file__ or "?", "exec")
        function = _function(module, site.function)
        function.__code__ = _code(compiled, function.__code__)

    return change


def _function(module: ModuleType, definition: ast.FunctionDef) -> FunctionType:
    """The function of the running module that a definition made."""
    owners = [module, *(v for v in vars(module).values() if inspect.isclass(v))]
    for owner in owners:
        found = vars(owner).get(definition.name)
        found = getattr(found, "fget", found)
        code = getattr(found, "__code__", None)
        if isinstance(found, FunctionType) and code and code.co_firstlineno in _lines(definition):
            return found
    raise LookupError(f"{module.__name__}.{definition.name} is no plain function")


def _lines(definition: ast.FunctionDef) -> range:
    first = min([definition.lineno, *(d.lineno for d in definition.decorator_list)])
    return range(first, definition.lineno + 1)


def _code(compiled: CodeType, old: CodeType) -> CodeType:
    """The new code of the function whose old code is known, by its name and first line."""
    pending = [compiled]
    while pending:
        code = pending.pop()
        if (code.co_name, code.co_firstlineno) == (old.co_name, old.co_firstlineno):
            return code
        pending += [const for const in code.co_consts if isinstance(const, CodeType)]
    raise LookupError(f"no code for {old.co_name}")


# -- places -------------------------------------------------------------------------------------


def _sites(tree: ast.Module) -> Iterator[_Site]:
    """Every place of every function and method that is no closure, in the order of the source."""
    for statement in tree.body:
        body = statement.body if isinstance(statement, ast.ClassDef) else [statement]
        for definition in body:
            if isinstance(definition, ast.FunctionDef) and definition.name not in _SKIPPED:
                inner = any(isinstance(n, ast.FunctionDef) for n in _inside(definition))
                if not inner and not _is_cached(definition):
                    yield from _in_function(definition)


def _is_cached(definition: ast.FunctionDef) -> bool:
    """Whether a decorator stands between the name and the function."""
    names = {ast.unparse(d) for d in definition.decorator_list}
    return bool(names - {"property"})


def _inside(definition: ast.FunctionDef) -> Iterator[ast.AST]:
    for statement in definition.body:
        yield from ast.walk(statement)


def _in_function(definition: ast.FunctionDef) -> Iterator[_Site]:
    for node in _inside(definition):
        if isinstance(node, ast.Assert):
            continue
        for what, change in _changes(node):
            yield _Site(definition, node, what, change)


def _changes(node: ast.AST) -> Iterator[tuple[str, Callable[[Any], None]]]:
    """What can be done to one node."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in _COMPARISONS:
            yield f"{ast.unparse(node)} reversed", _reverse
        case ast.BinOp(op=op) if type(op) in _OPERATORS and not _is_text(node):
            yield f"{ast.unparse(node)} with another operator", _operate
        case ast.If(test=test) | ast.IfExp(test=test) if not isinstance(test, ast.Compare):
            yield f"{ast.unparse(test)} negated", _negate
        case ast.Assign(targets=[ast.Attribute(attr=name)]) if name not in _UNSEEN:
            yield f"{ast.unparse(node)} left out", _drop
        case ast.Assign(targets=[ast.Subscript()]):
            yield f"{ast.unparse(node)} left out", _drop
        case ast.AugAssign(target=ast.Subscript(), op=op) if type(op) in _NEUTRAL:
            yield f"{ast.unparse(node)} left out", _drop


def _is_text(node: ast.BinOp) -> bool:
    return any(isinstance(n, ast.JoinedStr | ast.Constant) and _says(n) for n in ast.walk(node))


def _says(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str)


def _reverse(node: ast.Compare) -> None:
    node.ops = [_COMPARISONS[type(node.ops[0])]()]


def _operate(node: ast.BinOp) -> None:
    node.op = _OPERATORS[type(node.op)]()


def _negate(node: ast.If | ast.IfExp) -> None:
    node.test = ast.UnaryOp(ast.Not(), node.test)


def _drop(node: ast.Assign | ast.AugAssign) -> None:
    """What would be assigned is worked out, and goes nowhere."""
    if isinstance(node, ast.AugAssign):
        node.value = ast.Constant(_NEUTRAL[type(node.op)])
    else:
        node.targets = [ast.Name("_", ast.Store())]
