"""Every quirk by name."""

from __future__ import annotations

from typing import Final

from undervisor.hypervisor.quirks.processors import QUIRKS as PROCESSORS
from undervisor.hypervisor.quirks.quirk import Quirk
from undervisor.hypervisor.quirks.svm import QUIRKS as SVM
from undervisor.hypervisor.quirks.vmx import QUIRKS as VMX

CATALOGUE: Final[dict[str, Quirk]] = {quirk.name: quirk for quirk in (*PROCESSORS, *VMX, *SVM)}
