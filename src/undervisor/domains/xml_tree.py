"""Change an XML tree no more than a new value demands.

What is read by `number`, `scaled`, `cpus` is written by `put` and `put_attribute` only where the
value differs, so that a document which says the same in other words stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from lxml import etree

from undervisor.domains.quantities import parse_cpus, show_cpus, to_kib
from undervisor.errors import BadInput

T = TypeVar("T")
Element = etree._Element

ORDER = (
    "name", "uuid", "genid", "title", "description", "metadata", "maxMemory", "memory",
    "currentMemory", "memoryBacking", "vcpu", "vcpus", "iothreads", "iothreadids", "cputune",
    "memtune", "blkiotune", "numatune", "resource", "sysinfo", "os", "idmap", "features", "cpu",
    "clock", "on_poweroff", "on_reboot", "on_crash", "pm", "perf", "devices", "seclabel",
    "emulator", "disk", "interface", "serial", "console", "channel", "memballoon",
    "driver", "source", "model", "vendor", "maxphysaddr", "topology", "feature", "numa",
)  # fmt: skip
"""The usual order of elements, wherever they stand; those not named stay last."""


def text_of(parent: Element, path: str) -> str:
    """The stripped text of an element; empty where there is none."""
    return (parent.findtext(path) or "").strip()


def attribute(parent: Element, path: str, name: str) -> str:
    """An attribute of an element; empty where either is missing."""
    element = parent if path == "." else parent.find(path)
    return "" if element is None else (element.get(name) or "")


def integer(text: str) -> int:
    """A decimal number of at most 19 digits."""
    word = text.strip()
    if not word.lstrip("-").isascii() or not word.lstrip("-").isdigit() or len(word) > 20:
        raise ValueError(f"{word[:40]!r} is no number")
    return int(word)


def understood(what: str, convert: Callable[[str], T], text: str) -> T:
    """`text` converted; BadInput that names the place where it can't be."""
    try:
        return convert(text)
    except ValueError as error:
        raise BadInput(f"{what}: {error}", hint="libvirt would refuse it too") from error


def number(parent: Element, path: str) -> int | None:
    """A number in an element's text."""
    element = parent.find(path)
    return None if element is None else understood(f"<{path}>", integer, element.text or "")


def number_attribute(parent: Element, path: str, name: str) -> int | None:
    """A number in an attribute."""
    text = attribute(parent, path, name)
    return understood(f"{name} of <{path}>", integer, text) if text else None


def scaled(element: Element | None, unit: str = "KiB") -> int | None:
    """A size with its unit, in KiB; `unit` where none is said."""
    if element is None:
        return None
    said = element.get("unit") or unit
    return understood(
        f"<{element.tag}>", lambda t: to_kib(integer(t), said), element.text or ""
    )  # fmt: skip


def cpus(parent: Element, path: str, name: str) -> frozenset[int]:
    """A set of processors in an attribute; empty where there is none."""
    text = attribute(parent, path, name)
    return understood(f"{name} of <{path}>", parse_cpus, text) if text else frozenset()


def make(parent: Element, tag: str, **attributes: str) -> Element:
    """A new child in its usual place."""
    element = etree.Element(tag, {k: v for k, v in attributes.items() if v})
    place(parent, element)
    return element


def ensure(parent: Element, path: str) -> Element:
    """The element at `path`, made where it is missing."""
    for tag in path.split("/"):
        found = parent.find(tag)
        parent = make(parent, tag) if found is None else found
    return parent


def drop(element: Element) -> None:
    """Remove an element, and what held only it."""
    parent = element.getparent()
    while parent is not None:
        _detach(parent, element)
        if len(parent) or parent.attrib or (parent.text or "").strip() or _is_root(parent):
            return
        element, parent = parent, parent.getparent()


def put(parent: Element, path: str, text: str | None) -> None:
    """Set an element's text; None removes the element."""
    element = parent.find(path)
    if text is None:
        if element is not None:
            drop(element)
    elif element is None or (element.text or "").strip() != text:
        ensure(parent, path).text = text


def put_number(parent: Element, path: str, value: int | None) -> None:
    """Set a number."""
    if number(parent, path) != value:
        put(parent, path, None if value is None else str(value))


def put_scaled(parent: Element, path: str, kib: int | None, unit: str = "KiB") -> None:
    """Set a size, in KiB."""
    element = parent.find(path)
    if scaled(element, unit) == kib:
        return
    put(parent, path, None if kib is None else str(kib))
    if kib is not None:
        ensure(parent, path).set("unit", "KiB")


def put_attribute(parent: Element, path: str, name: str, value: str) -> None:
    """Set an attribute; an empty value removes it, and the element that it leaves empty."""
    element = parent if path == "." else parent.find(path)
    if value:
        element = ensure(parent, path) if element is None else element
        if element.get(name) != value:
            element.set(name, value)
    elif element is not None and name in element.attrib:
        del element.attrib[name]
        if path != "." and not len(element) and not element.attrib and not element.text:
            drop(element)


def put_number_attribute(parent: Element, path: str, name: str, value: int | None) -> None:
    """Set a number in an attribute."""
    if number_attribute(parent, path, name) != value:
        put_attribute(parent, path, name, "" if value is None else str(value))


def put_cpus(parent: Element, path: str, name: str, value: frozenset[int]) -> None:
    """Set a set of processors in an attribute."""
    if cpus(parent, path, name) != value:
        put_attribute(parent, path, name, show_cpus(value))


def match_by_ordinal(
    elements: Sequence[Element], ordinals: Sequence[int], create: Callable[[int], Element]
) -> list[Element]:
    """The element of each part: its own by its ordinal, else a new one; the rest is removed.

    `create` gets the place of the part.
    """
    kept = [elements[o] if 0 <= o < len(elements) else None for o in ordinals]
    for element in elements:
        if not any(element is k for k in kept):
            drop(element)
    return [create(at) if element is None else element for at, element in enumerate(kept)]


def _is_root(element: Element) -> bool:
    return element.getparent() is None or element.tag == "devices"


def _rank(element: Element) -> int:
    tag = element.tag
    return ORDER.index(tag) if isinstance(tag, str) and tag in ORDER else len(ORDER)


def place(parent: Element, element: Element) -> None:
    """Insert after the last child that usually stands before it, indented as the document is."""
    rank = _rank(element)
    index = 0
    for at, child in enumerate(parent):
        if isinstance(child.tag, str) and _rank(child) <= rank:
            index = at + 1
    depth = sum(1 for _ in parent.iterancestors())
    inner, outer = "\n" + "  " * (depth + 1), "\n" + "  " * depth
    if not len(parent) and not (parent.text or "").strip():
        parent.text, element.tail = inner, outer
    elif index == 0:
        element.tail = parent.text
    else:
        before = parent[index - 1]
        element.tail, before.tail = before.tail, inner if not before.tail else before.tail
        if index == len(parent):
            before.tail = inner
    parent.insert(index, element)


def _detach(parent: Element, element: Element) -> None:
    """Remove one child; text after it that is more than blanks stays."""
    before, tail = element.getprevious(), element.tail or ""
    has = (parent.text if before is None else before.tail) or ""
    if tail.strip():
        has += tail
    elif element.getnext() is None and not has.strip():
        has = tail  # the blanks before the closing tag
    if before is None:
        parent.text = has
    else:
        before.tail = has
    parent.remove(element)
    if not len(parent) and not (parent.text or "").strip():
        parent.text = None
