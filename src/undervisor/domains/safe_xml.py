"""XML from anywhere: no document type, no entities, no network, bounded size and depth."""

from __future__ import annotations

import re

from lxml import etree

from undervisor.errors import BadInput

SIZE_LIMIT = 4 << 20
"""Bytes of a definition; libvirt's own messages end at 32 MiB, real definitions at 100 KiB."""

_DECLARED = re.compile(r"<\?xml[^>]{0,200}?encoding\s*=\s*[\"']([A-Za-z0-9._-]{1,40})[\"']")


def parse(raw: bytes | str, root: str) -> etree._Element:
    """The element `root` of a document; comments, CDATA and blanks stay.  Raises BadInput."""
    text = _decode(raw)
    if len(text) > SIZE_LIMIT:
        raise BadInput(f"the XML is longer than {SIZE_LIMIT >> 20} MiB", hint="is it a definition?")
    _refuse_document_type(text)
    parser = etree.XMLParser(
        resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False, strip_cdata=False
    )
    body = re.sub(r"^\s*<\?xml[^>]{0,200}\?>", "", text, count=1)
    try:
        element = etree.fromstring(body.encode("utf-8"), parser)
    except (etree.XMLSyntaxError, UnicodeEncodeError) as error:
        raise BadInput(f"this is no well-formed XML: {str(error)[:200]}") from error
    if element.tag != root:
        raise BadInput(f"<{str(element.tag)[:40]}> is not <{root}>", hint=f"give a <{root}>")
    return element


def _decode(raw: bytes | str) -> str:
    """UTF-8, said or not; anything else is refused by name."""
    if isinstance(raw, bytes):
        if len(raw) > SIZE_LIMIT:
            raise BadInput(f"the XML is longer than {SIZE_LIMIT >> 20} MiB")
        try:
            raw = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadInput(
                f"the XML is not UTF-8: {error.reason}", hint="iconv -t UTF-8"
            ) from error
    declared = _DECLARED.match(raw.lstrip())
    if declared and declared[1].lower() not in ("utf-8", "utf8", "us-ascii", "ascii"):
        raise BadInput(f"the XML says that it is {declared[1]}; libvirt's is UTF-8")
    return raw


def _refuse_document_type(text: str) -> None:
    """A document type can stand only before the root; with it come entities and files."""
    at = 0
    while True:
        rest = text[at : at + 10].lstrip()
        at += len(text[at : at + 10]) - len(rest) if rest else 10
        if at >= len(text):
            return
        if rest.startswith("<!DOCTYPE"):
            raise BadInput(
                "the XML declares a document type, and with it entities",
                hint="libvirt's definitions have none; remove <!DOCTYPE ...>",
            )
        for begin, end in (("<!--", "-->"), ("<?", "?>")):
            if rest.startswith(begin):
                stop = text.find(end, at + len(begin))
                at = len(text) if stop < 0 else stop + len(end)
                break
        else:
            if rest:
                return


def to_text(element: etree._Element) -> str:
    """The document, comments around the root included, with one newline at its end."""
    text: str = etree.tostring(element.getroottree(), encoding="unicode")
    return text.rstrip("\n") + "\n"
