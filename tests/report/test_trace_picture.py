"""The picture is drawing what the timeline says."""

import io
from xml.etree import ElementTree

from trace_things import Step

from undervisor.report.trace.picture import COLOURS, WIDTH, Picture

SVG = "{http://www.w3.org/2000/svg}"


class Kept(io.StringIO):
    """A file whose text can be read after it was closed."""

    def close(self):
        self.text = self.getvalue()
        super().close()


def drawn(*steps, vcpus=1, title="an image"):
    file = Kept()
    picture = Picture(file, vcpus, title)
    for step in steps:
        picture.add(step)
    picture.close()
    return ElementTree.fromstring(file.text)


def boxes(root, level):
    return [r for r in root.iter(f"{SVG}rect") if r.get("fill") == COLOURS[level]]


def test_each_vcpu_has_a_row_for_each_level():
    words = [text.text for text in drawn(Step(), vcpus=2).iter(f"{SVG}text")]
    assert words.count("L2") == words.count("L1") == words.count("L0") == 2
    assert "vCPU 1" in words


def test_a_guest_and_its_exit_are_boxes_on_their_rows():
    root = drawn(Step(time=50_000, ran=20_000))
    assert len(boxes(root, 2)) == len(boxes(root, 0)) == 1
    assert boxes(root, 1) == []


def test_what_is_closer_than_a_pixel_is_one_box():
    many = [Step(time=10_000_000 + 1_010 * n, ran=10) for n in range(1000)]
    far = Step(time=90_000_000, ran=1000)
    assert len(boxes(drawn(*many, far), 2)) < 20


def test_everything_is_inside_the_picture():
    root = drawn(*(Step(time=3_000 * n, ran=1_500, level=1 + n % 2) for n in range(1, 50)))
    for level in COLOURS:
        for box in boxes(root, level):
            x, width = float(box.get("x")), float(box.get("width"))
            assert x >= 0
            assert x + width <= WIDTH


def test_a_run_without_l2_and_an_empty_one_can_be_drawn():
    assert boxes(drawn(Step(level=1, to=1)), 1)
    assert boxes(drawn(), 0) == []


def test_a_hostile_title_is_text():
    words = [text.text for text in drawn(title="</svg><script>").iter(f"{SVG}text")]
    assert "</svg><script>" in words
