"""The picture, the page and the table of a comparison say what was found."""

import math
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from undervisor.lab.levels.comparison import compare
from undervisor.lab.levels.estimate import Estimate
from undervisor.lab.levels.measures import MEASURES
from undervisor.lab.levels.session import Effort, Findings
from undervisor.report.levels.page import page
from undervisor.report.levels.picture import BAND, COLOURS, LEFT, RIGHT, WIDTH, axis, picture
from undervisor.report.levels.words import cells, head, missing, number

SVG = "{http://www.w3.org/2000/svg}"
SIX = [0.98, 1.0, 1.0, 1.0, 1.0, 1.02]


def comparison(costs, emulated=False):
    """`{"L1": {"cpu": 2.0}}`; every other measure is missing there."""
    found = Findings({name: f"<machine> {name}" for name in costs})
    found.below = dict.fromkeys(costs, "TCGTCGTCGTCG" if emulated else "KVMKVMKVM")
    found.clocks = {name: [0.9] for name in costs}
    found.measures = list(MEASURES)
    for one in MEASURES:
        known = {name: given[one.key] for name, given in costs.items() if one.key in given}
        # Each level is disturbed in another round, so that ratios have an interval.
        found.costs[one.key] = {
            name: [cost * s for s in SIX[place:] + SIX[:place]]
            for place, (name, cost) in enumerate(known.items())
        }
        found.missing[one.key] = {name: "no <disk>" for name in costs if name not in known}
    return compare(found, Effort(6, 1, 1000))


THREE = {"L0": {"cpu": 1.0, "exit": 50.0}, "L1": {"cpu": 2.0, "exit": 1e3}, "L2": {"cpu": 2.4}}


def drawn(made):
    return ElementTree.fromstring(picture(made))


def dots(root, colour):
    """Without the legend's, which is above the axis."""
    circles = [c for c in root.iter(f"{SVG}circle") if c.get("fill") == colour]
    return [float(c.get("cx")) for c in circles if float(c.get("cx")) >= LEFT]


def words_of(root):
    return [text.text for text in root.iter(f"{SVG}text")]


def test_each_ratio_is_a_dot_at_its_place():
    made = comparison(THREE)
    root, scale = drawn(made), axis(made)
    assert dots(root, COLOURS[0]) == [pytest.approx(scale.x(r), abs=0.1) for r in (2, 20)]
    assert dots(root, COLOURS[1]) == [pytest.approx(scale.x(1.2), abs=0.1)]
    assert {"L1/L0", "L2/L1", "L2/L0"} <= set(words_of(root))


def test_an_interval_is_a_line_through_its_dot():
    root = drawn(comparison(THREE))
    lines = [line for line in root.iter(f"{SVG}line") if line.get("stroke") == COLOURS[1]]
    (low, high), (middle,) = (float(lines[0].get(k)) for k in ("x1", "x2")), dots(root, COLOURS[1])
    assert len(lines) == 1
    assert low < middle < high


def test_everything_is_inside_the_picture():
    made = comparison({"L0": {"cpu": 1e-3}, "L1": {"cpu": 7e3, "read": 1.0}, "L2": {"cpu": 1.0}})
    root = drawn(made)
    for colour in COLOURS[:3]:
        assert all(LEFT <= x <= WIDTH - RIGHT for x in dots(root, colour))
    height = float(root.get("viewBox").split()[3])
    assert all(0 < float(text.get("y")) < height for text in root.iter(f"{SVG}text"))


def test_the_axis_holds_one_and_every_interval():
    scale = axis(comparison(THREE))
    assert (scale.first, scale.last) == (0, 2)
    assert scale.x(1) == LEFT
    assert scale.x(100) == WIDTH - RIGHT
    assert scale.x(10) == pytest.approx((LEFT + WIDTH - RIGHT) / 2)


def test_the_budget_is_drawn_where_something_is_held_to_it():
    bands = [r for r in drawn(comparison(THREE)).iter(f"{SVG}rect") if r.get("fill") == BAND]
    scale = axis(comparison(THREE))
    assert float(bands[1].get("x")) == pytest.approx(scale.x(1.1), abs=0.1)
    assert float(bands[1].get("width")) == pytest.approx(scale.x(1.3) - scale.x(1.1), abs=0.2)


def test_under_emulation_there_is_no_budget_and_the_picture_says_why():
    root = drawn(comparison(THREE, emulated=True))
    assert not [r for r in root.iter(f"{SVG}rect") if r.get("fill") == BAND]
    assert any("of an emulation" in text for text in words_of(root))


def test_what_was_not_measured_says_so():
    root = drawn(comparison({"L0": {"cpu": 1.0}, "L1": {"cpu": 2.0}}))
    assert words_of(root).count("not measured") == len(MEASURES) - 1


def test_the_table_has_a_cell_for_each_column():
    made = comparison(THREE)
    assert head(made) == ("measurement", "L0", "L1", "L2", "L1/L0", "L2/L1", "L2/L0", "budget")
    for row in made.rows:
        assert len(list(cells(made, row))) == len(head(made))
    first, second = (list(cells(made, row)) for row in made.rows[:2])
    assert first[1:4] == ["1.00 ns", "2.00 ns", "2.40 ns"]
    assert first[5].startswith("1.20 (1.")
    assert first[7] == "within (L2/L1)"
    assert second[3] == second[5] == "-"


def test_under_emulation_the_table_has_no_budget():
    made = comparison(THREE, emulated=True)
    assert head(made)[-1] == "L2/L0"
    assert all(len(list(cells(made, row))) == len(head(made)) for row in made.rows)


def test_a_reason_is_said_once_with_all_that_it_is_for():
    (line,) = missing(comparison({"L0": {}, "L1": {"cpu": 1.0}}))[:1]
    assert line.startswith("Not measured at L0: integer arithmetic, one step, an instruction")
    assert line.endswith(": no <disk>")


@pytest.mark.parametrize(
    ("value", "text"),
    [(1, "1.00"), (4097.2, "4,097"), (53.57, "53.6"), (0.52, "0.52"), (0.00103, "0.001")],
)
def test_numbers_have_three_digits_that_count(value, text):
    assert number(value) == text


class Page(HTMLParser):
    """What a page says, and the tags that it has."""

    def __init__(self):
        super().__init__()
        self.tags, self.said = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.said.append(data)


def test_the_page_stands_alone_and_escapes_what_machines_say():
    made = comparison(THREE, emulated=True)
    parser = Page()
    parser.feed(page(made))
    assert "machine" not in parser.tags
    assert "disk" not in parser.tags
    assert any("<machine> L1" in text for text in parser.said)
    assert "svg" in parser.tags
    assert parser.tags.count("tr") == 1 + len(made.levels) + 1 + len(made.rows)
    assert not {"script", "link", "img"} & set(parser.tags)
    assert any("of an emulation" in text for text in parser.said)


def test_the_axis_is_never_empty():
    same = Estimate(1.0, 1.0, 1.0, 0.97, 6)
    made = comparison({"L0": {}, "L1": {}})
    assert axis(made).last > axis(made).first
    assert math.isfinite(axis(made).x(same.middle))
