"""What is known of one defect of a peer."""

from __future__ import annotations

import re
from dataclasses import dataclass

from undervisor.conformance.runner import Result


@dataclass(frozen=True, slots=True)
class Known:
    """A defect: `target` and `tests` are patterns of names; `message`, where given, of the verdict.

    `what` says what the peer does, `evidence` how one knows that it is the peer that is wrong.
    """

    target: str
    tests: str
    what: str
    evidence: str
    message: str = ""

    def fits(self, result: Result) -> bool:
        """Whether this is what a bad result shows."""
        return bool(
            re.fullmatch(self.target, result.target)
            and re.fullmatch(self.tests, result.test.id)
            and re.search(self.message, result.message)
        )
