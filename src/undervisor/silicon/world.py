"""The words in which a world is given to the silicon: a VMCB's fields and its intercepts.

The silicon is an AMD processor whatever L1 believes in; who merges a guest's state for it, of
either vendor, speaks its language through this module.
"""

from undervisor.arch.svm.exits import ExitCode
from undervisor.arch.svm.intercepts import Intercept, intercept_mask
from undervisor.arch.svm.vmcb import VmcbField

__all__ = ["ExitCode", "Intercept", "VmcbField", "intercept_mask"]
