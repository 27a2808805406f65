"""The distribution's packages, downloaded and unpacked by its own tools, without root.

`apt-get download` fetches and verifies, `dpkg-deb` unpacks; nothing is installed.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from undervisor.errors import BadInput
from undervisor.lab.cache import Cache
from undervisor.lab.progress import SILENT, Progress

KERNEL: Final = "linux-image-cloud-amd64"
"""Debian's name for its newest kernel for virtual machines; it depends on the one of that name."""
BUSYBOX: Final = "busybox-static"

_MINUTES: Final = 600
_OFFER: Final = re.compile(r"'(?P<uri>[^']+)' (?P<file>\S+\.deb) (?P<size>\d+) \S*")
_NO_APT: Final = "give the files yourself: --kernel, --modules and --busybox"


@dataclass(frozen=True, slots=True)
class Offer:
    """A package as the archive has it: `file` holds its name, version and architecture."""

    package: str
    file: str
    size: int


def depends(package: str, pattern: str) -> str:
    """The first package that `package` depends on and whose name matches `pattern`."""
    said = _apt(["apt-cache", "depends", "--important", package])
    found = re.search(rf"^\s*Depends: ({pattern})$", said, re.MULTILINE)
    if not found:
        raise BadInput(f"apt knows no {package}", hint=f"`apt-get update` may help; or {_NO_APT}")
    return found[1]


def offers(packages: Sequence[str]) -> list[Offer]:
    """What the archive would send for each of `packages`."""
    said = _apt(["apt-get", "download", "--print-uris", *packages])
    found = {unquote(m["file"]).split("_")[0]: m for m in _OFFER.finditer(said)}
    missing = [name for name in packages if name not in found]
    if missing:
        raise BadInput(f"apt offers no {', '.join(missing)}", hint="`apt-get update` may help")
    return [Offer(name, found[name]["file"], int(found[name]["size"])) for name in packages]


def unpacked(cache: Cache, offer: Offer, progress: Progress = SILENT) -> Path:
    """The folder with the package's files; downloaded where it has not been yet."""

    def make(place: Path) -> None:
        place.mkdir()
        with progress.growing(f"downloading {offer.package}", offer.size, place):
            _apt(["apt-get", "download", "-q", offer.package], place)
        with progress.working(f"unpacking {offer.package}"):
            for archive in place.glob("*.deb"):
                _apt(["dpkg-deb", "-x", str(archive), str(place)])
                archive.unlink()

    return cache.entry(offer.file.removesuffix(".deb"), make)


def _apt(command: Sequence[str], folder: Path | None = None) -> str:
    """The output of a command of apt's; BadInput with its last words where it fails."""
    try:
        ran = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=_MINUTES,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
            check=False,
        )
    except FileNotFoundError:
        raise BadInput(f"there is no {command[0]} on this machine", hint=_NO_APT) from None
    except subprocess.TimeoutExpired:
        raise BadInput(f"`{' '.join(command)}` did not end in {_MINUTES} s") from None
    if ran.returncode:
        words = (ran.stderr.strip() or ran.stdout.strip()).splitlines()[-1:]
        raise BadInput(
            f"`{' '.join(command)}` failed: {words[0] if words else ran.returncode}",
            hint=f"`apt-get update` may help; or {_NO_APT}",
        )
    return ran.stdout
