"""The page of the documentation about CPU models, made from the tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from undervisor.arch.x86.cpuid import BY_NAME, Vendor
from undervisor.arch.x86.msr import MSRS, name_of
from undervisor.hypervisor.models.catalog import ROWS, build
from undervisor.hypervisor.models.dependencies import ARCH_CAPABILITIES
from undervisor.hypervisor.models.support import EMULATED, NATIVE, STORED_ONLY, UNSUPPORTED
from undervisor.hypervisor.models.vmx_features import VMX_BY_NAME


def page() -> str:
    """The whole page, Markdown."""
    return "\n".join(_lines()) + "\n"


def manual_name(name: str) -> str:
    """What the manual calls a feature."""
    if name in BY_NAME:
        return BY_NAME[name].manual
    if name in VMX_BY_NAME:
        return VMX_BY_NAME[name].manual
    return f"IA32_ARCH_CAPABILITIES bit {ARCH_CAPABILITIES[name]}"


def _lines() -> Iterator[str]:
    yield "# CPU models and features"
    yield ""
    yield "`--cpu NAME[,+feature][,-feature][,feature=on|off][,phys-bits=N]...` chooses what an L1"
    yield "sees as its processor. A feature that is switched off takes along what depends on it."
    yield "Only CPUID and the registers change: an instruction of the silicon that a model lacks"
    yield "still executes, as on a processor whose firmware hides it."
    yield ""
    yield "## Models"
    yield ""
    yield "| name | what it is | family/model/stepping | features |"
    yield "|---|---|---|---|"
    for name, row in ROWS.items():
        version = f"{row.family}/{row.model}/{row.stepping}"
        yield f"| `{name}` | {row.about} | {version} | {len(build(name).features)} |"
    yield from _table("Done by the silicon", "part of", NATIVE)
    yield from _table("Done by the L0 for the silicon", "how", EMULATED)
    yield from _table("Not offered", "why", UNSUPPORTED)
    yield ""
    yield "## Registers that store and do no more"
    yield ""
    yield "| MSR | what does not happen |"
    yield "|---|---|"
    for number, reason in STORED_ONLY.items():
        vendor = Vendor.INTEL if number in MSRS[Vendor.INTEL] else Vendor.AMD
        yield f"| {name_of(number, vendor)} ({number:#x}) | {reason} |"


def _table(title: str, column: str, features: Mapping[str, str]) -> Iterator[str]:
    """One section: a row per feature, in the order of the table."""
    yield ""
    yield f"## {title}"
    yield ""
    yield f"| feature | in the manual | {column} |"
    yield "|---|---|---|"
    for name, reason in features.items():
        yield f"| `{name}` | {manual_name(name)} | {reason} |"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
