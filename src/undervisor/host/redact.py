"""Take secrets out of text: the same secret becomes the same word, so that relations survive.

What is removed: private keys, credentials in URLs and on command lines, well-known token shapes,
serial numbers, UUIDs, MAC and IP addresses, instance ids, home folders, who built the kernel, and
the machine's names.
Kept on purpose: loopback and unspecified addresses, version numbers, PCI addresses.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_HEX = "[0-9A-Fa-f]"


@dataclass(frozen=True, slots=True)
class Pattern:
    """One kind of secret; group `secret` of `shape` is what goes (the whole match without it)."""

    kind: str
    shape: re.Pattern[str]
    keep: Callable[[str], bool] = lambda _: False


def _harmless_ip(text: str) -> bool:
    """Addresses that say nothing about a machine, and dotted numbers that are no address."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return True
    return address.is_loopback or address.is_unspecified or text.startswith("255.")


def _nothing(text: str) -> bool:
    """Values that DMI tables print where there is no serial number."""
    plain = text.strip().strip('"').lower()
    empty = ("", "none", "not specified", "unknown", "default string", "not present", "no", "on")
    return plain in (*empty, "off", "true", "false", "to be filled by o.e.m.")


def _no_credential(text: str) -> bool:
    """Values of credential options that are none: paths, switches, numbers."""
    return _nothing(text) or text.startswith(("/", "-")) or text.isdigit()


_WORDS = (
    r"(?:passw(?:or)?d|passphrase|secret|token|api[_-]?key|auth[_-]?key|access[_-]?key|credential)"
)
_VALUE = r"(?P<secret>\"[^\"\n]{1,4000}\"|'[^'\n]{1,4000}'|[^\s,;&\"']{4,4000})"

PATTERNS: tuple[Pattern, ...] = (
    Pattern(
        "private-key",
        re.compile(
            r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----[^-]{0,20000}-----END [A-Z ]{0,40}KEY-----"
        ),
    ),
    Pattern("url-credentials", re.compile(r"://(?P<secret>[^/\s:@]{1,200}:[^/\s@]{1,200})@")),
    Pattern(
        "token",
        re.compile(
            r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{20,255}\b|\bglpat-[\w-]{20,64}\b"
            r"|\beyJ[\w-]{8,2000}\.[\w-]{8,4000}\.[\w-]{8,1000}\b|\bxox[abprs]-[\w-]{10,200}"
        ),
    ),
    Pattern("token", re.compile(r"(?i)\b(?:bearer|basic)\s+(?P<secret>[\w.~+/=-]{8,4000})")),
    Pattern(
        "credential",
        re.compile(
            rf"(?i)(?:{_WORDS}[\"']?\s*[=:]|(?<![\w-])(?:key|data|pw|pwd|pass)=)\s*{_VALUE}"
        ),
        keep=_no_credential,
    ),
    Pattern(
        "credential",
        re.compile(rf"(?i)(?<!\S)--?(?:[\w-]{{0,30}}-)?{_WORDS}\s+{_VALUE}"),
        keep=_no_credential,
    ),
    Pattern(
        "serial",
        re.compile(
            r"(?im)(?:serial[ _]?(?:number|no)?|service tag|sequence code|asset tag|machine-id)"
            r"\s*[:=]\s*(?P<secret>[^\s,][^\n,]{0,120}?)(?=\s*$|,|\s{2,})"
        ),
        keep=lambda text: _nothing(text) or text.startswith(("chardev:", "mon:", "file:", "pty")),
    ),
    Pattern(
        "uuid", re.compile(rf"\b{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}\b")
    ),
    Pattern("mac", re.compile(rf"(?<![\w:-])(?:{_HEX}{{2}}:){{5}}{_HEX}{{2}}(?![\w:-])")),
    Pattern(
        "address",
        re.compile(rf"(?<![\w:.])(?:{_HEX}{{1,4}}:{{1,2}}){{1,7}}{_HEX}{{0,4}}(?![\w:.])"),
        keep=lambda text: _harmless_ip(text) or ("::" not in text and text.count(":") != 7),
    ),
    Pattern(
        "address",
        re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)"),
        keep=_harmless_ip,
    ),
    Pattern("instance-id", re.compile(r"\b(?:i|ami|vol|eni)-(?:[0-9a-f]{17}|[0-9a-f]{8})\b")),
    Pattern(
        "email", re.compile(r"\b[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){0,4}\.[a-z]{2,10}\b")
    ),
    Pattern(
        "builder",
        re.compile(r"Linux version \S{1,100} \((?P<secret>[^\s@()]{1,64}@[^\s()]{1,253})\)"),
    ),
    Pattern("home", re.compile(r"/home/(?P<secret>[^/\s:,;'\"]{1,64})")),
)

_TOO_COMMON = {"localhost", "linux", "host", "guest", "kvm", "qemu", "debian", "ubuntu", "fedora"}


class Redactor:
    """Replaces secrets; `removed` counts the distinct ones by kind."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._words: dict[tuple[str, str], str] = {}
        self._patterns = list(PATTERNS)
        wanted = {name for name in names if len(name) > 2 and name.lower() not in _TOO_COMMON}
        for name in sorted(wanted, key=lambda text: (-len(text), text)):
            shape = re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")
            self._patterns.append(Pattern("name", shape))

    def text(self, text: str) -> str:
        """`text` without its secrets."""
        for pattern in self._patterns:
            text = pattern.shape.sub(lambda match, p=pattern: self._word(p, match), text)  # type: ignore[misc]
        return text

    def raw(self, raw: bytes) -> bytes:
        """`raw` without its secrets; bytes that are no text stay as they are."""
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            return raw
        if "\0" in text and "\n" not in text:
            # A list of words as in /proc/PID/cmdline: each on a line of its own for the patterns.
            return self.text(text.replace("\0", "\n")).replace("\n", "\0").encode()
        return self.text(text).encode()

    @property
    def removed(self) -> dict[str, int]:
        """How many distinct secrets of each kind were taken out."""
        return dict(sorted(Counter(kind for kind, _ in self._words).items()))

    def _word(self, pattern: Pattern, match: re.Match[str]) -> str:
        whole = match.group(0)
        secret = match.groupdict().get("secret", whole) or whole
        if pattern.keep(secret) or secret.startswith("[removed-"):
            return whole
        key = (pattern.kind, secret)
        if key not in self._words:
            number = 1 + sum(kind == pattern.kind for kind, _ in self._words)
            self._words[key] = f"[removed-{pattern.kind}-{number}]"
        return whole.replace(secret, self._words[key])
