"""The documents agree with the code."""

import json
import re
from pathlib import Path

import pytest

from undervisor.host.checks.finding import KINDS, Layer
from undervisor.report.pages import pages

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"


def test_the_pages_of_the_findings_are_up_to_date():
    there = {path.name: path.read_text() for path in (DOCS / "findings").glob("*.md")}
    assert there == dict(pages()), "run: python -m undervisor.report.pages docs/findings"


def rows():
    text = (DOCS / "problems.md").read_text()
    return re.findall(
        r"^\| (\d+) \| (.+) \| (.+) \| \[([\w-]+)\]\((.+)\) \| ([\w.-]+) \|$", text, re.M
    )


def test_there_are_twenty_situations():
    assert [int(row[0]) for row in rows()] == list(range(1, 21))


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_a_situation_leads_to_a_finding_that_is_shown(row):
    _, _, _, finding, link, machine = row
    assert finding in KINDS
    assert (DOCS / link).exists()
    if machine == "migrate":
        assert KINDS[finding].layer is Layer.MIGRATION
    else:
        expected = json.loads((ROOT / "tests/hosts" / machine / "expected.json").read_text())
        assert finding in expected["findings"]


def test_links_between_documents_lead_somewhere():
    for path in DOCS.glob("*.md"):
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
            assert (path.parent / link).exists(), f"{path.name}: {link}"
