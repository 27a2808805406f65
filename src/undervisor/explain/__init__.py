"""Why a VM entry failed, from whatever text or bytes a person has in hand.

read(data) -> list[Dump]              recognise a format and take the state out of it
diagnose(dump) -> Diagnosis           every broken rule, the likely cause first
explain(state, capabilities)          the broken rules of a state, for programs
"""

from undervisor.explain.diagnosis import Diagnosis, diagnose, explain
from undervisor.explain.dump import Dump, Failure, Observation
from undervisor.explain.recognise import read, read_file

__all__ = [
    "Diagnosis",
    "Dump",
    "Failure",
    "Observation",
    "diagnose",
    "explain",
    "read",
    "read_file",
]
