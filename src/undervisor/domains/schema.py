"""libvirt's own RELAX NG schemas, from the libvirt that is installed."""

from __future__ import annotations

import functools
import os

from lxml import etree

from undervisor.domains.safe_xml import parse
from undervisor.errors import BadInput
from undervisor.host.fact import Absent, Fact, Known

FOLDER = "/usr/share/libvirt/schemas"
FILES = {"domain": "domain.rng", "network": "network.rng"}
"""The schema of each kind of document; Debian: package libvirt-daemon (libvirt0 before 9)."""


def violations(text: str, kind: str, folder: str = FOLDER) -> Fact[tuple[str, ...]]:
    """What the schema of `kind` (domain or network) says against a document; absent where there is
    no schema here.  Raises BadInput for what is no XML."""
    root = parse(text, kind)
    path = os.path.join(folder, FILES[kind])
    if not os.path.exists(path):
        return Absent(path)
    schema = _schema(path)
    if schema.validate(root):
        return Known((), path)
    log = schema.error_log
    said = dict.fromkeys(f"line {entry.line}: {entry.message}"[:300] for entry in log)
    return Known(tuple(said) or ("it does not follow the schema",), path)


@functools.cache
def _schema(path: str) -> etree.RelaxNG:
    """A schema; compiled once, which takes 50 ms."""
    try:
        return etree.RelaxNG(etree.parse(path))
    except (etree.XMLSyntaxError, etree.RelaxNGParseError, OSError) as error:
        raise BadInput(f"libvirt's schema {path} can't be used: {error}") from error
