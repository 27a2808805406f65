"""The documents agree with the code."""

import re
from pathlib import Path

from undervisor.explain.diagnosis import ALL_RULES
from undervisor.explain.pages import groups, pages

DOCS = Path(__file__).parent.parent.parent / "docs"


def test_the_pages_of_the_rules_are_up_to_date():
    there = {path.name: path.read_text() for path in (DOCS / "rules").glob("*.md")}
    assert there == dict(pages()), "run: python -m undervisor.explain.pages docs/rules"


def test_every_rule_is_on_one_page():
    shown = [rule.id for rules in groups().values() for rule in rules]
    assert sorted(shown) == sorted(ALL_RULES)


def test_the_suspects_of_the_guide_are_rules_on_the_linked_page():
    rows = re.findall(
        r"^\| \[`([^\]]+)\]\(rules/([^)]+)\)", (DOCS / "my-vm-entry-failed.md").read_text(), re.M
    )
    assert len(rows) >= 10
    for names, link in rows:
        text = (DOCS / "rules" / link).read_text()
        for name in re.findall(r"[a-z0-9.*-]+(?:_[a-z]+)?", names.split("`")[0]):
            words = [re.escape(part) for part in name.split("*")]
            assert re.search("## " + ".*".join(words), text), f"{name} in {link}"


def test_the_commands_of_the_guide_exist():
    text = (DOCS / "my-vm-entry-failed.md").read_text() + (DOCS / "explain.md").read_text()
    verbs = set(re.findall(r"undervisor (explain|rules|caps|state)\b", text))
    assert verbs == {"explain", "rules", "caps", "state"}
