"""Imports go one way: each package may import only what its row allows."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "undervisor"

# package: the packages of ours that it may import.  `errors` and `orphans` are below all of them.
ALLOWED = {
    "arch": set(),
    "silicon": {"arch"},
    "explain": {"arch"},
    "devices": {"arch"},
    "hypervisor": {"arch", "devices", "silicon"},
    "guest": {"arch"},
    "targets": {"arch", "devices", "guest", "hypervisor", "silicon"},
    "conformance": {"arch", "guest", "targets"},
    "host": {"arch"},
    "domains": {"arch", "host"},
    "lab": {"arch", "host", "domains", "guest", "targets"},
    "report": {"arch", "explain", "host", "domains", "lab"},
    "shell": {"arch", "explain", "guest", "targets"},
    "testing": {"api", "arch", "explain", "guest", "hypervisor", "report", "targets"},
}
ONLY_BUILTIN_MAY = {"hypervisor", "silicon"}


def imports(path: Path) -> list[str]:
    """The dotted names of ours that a module imports, whole."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in names if name.split(".")[0] == "undervisor"]


def modules(package: str) -> list[Path]:
    return sorted((SOURCE / package).rglob("*.py"))


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_a_package_imports_only_what_its_layer_allows(package):
    for path in modules(package):
        for name in imports(path):
            below = name.split(".")[1]
            if below in ("errors", "orphans", package, "__version__"):
                continue
            assert below in ALLOWED[package], f"{path.relative_to(SOURCE)} imports {name}"
            if package == "targets" and below in ONLY_BUILTIN_MAY:
                assert path.parent.name == "builtin", f"{path.relative_to(SOURCE)} imports {name}"


def test_every_package_has_a_row():
    packages = {p.name for p in SOURCE.iterdir() if (p / "__init__.py").exists()}
    assert packages - {"cli"} <= set(ALLOWED)


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_nothing_imports_the_command_line(package):
    for path in modules(package):
        assert not [n for n in imports(path) if n.startswith("undervisor.cli")], path


@pytest.mark.parametrize(("one", "other"), [("vmx", "svm"), ("svm", "vmx")])
def test_the_vendors_never_import_each_other(one, other):
    for path in SOURCE.rglob("*.py"):
        if one in path.relative_to(SOURCE).parts:
            assert not [n for n in imports(path) if other in n.split(".")], path
