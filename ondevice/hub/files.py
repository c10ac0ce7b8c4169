"""Files that come from elsewhere: how far they are, how large, and whether they are what they should be."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import BadFile, OnDeviceError

BLOCK = 1 << 20  # bytes read at once
RETRY = "Check the connection and try again: what was fetched is kept and the rest resumed."


@dataclass(frozen=True)
class Fetching:
    """Reported while files come: bytes done, of all."""

    done: int
    total: int


Say = Callable[[str], None]
Progress = Callable[[Fetching], None]


def check(path: Path, name: str, digest: hashlib._Hash, wanted: str) -> None:
    """Raises BadFile unless the file's digest is the one that is wanted."""
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    found = digest.hexdigest()
    if found != wanted:
        raise BadFile(
            f"What was fetched as {name} is not it: its hash begins {found[:12]}, not {wanted[:12]}.",
            "Fetch it again; if it stays so, the source is damaged or altered.",
        )


def keep(partial: Path, final: Path) -> None:
    """Gives a file that is whole its name, once it is on the disk to stay."""
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, final)


def nbytes(path: Path) -> int:
    """Of a file, or of all files in a folder; files and folders that vanish meanwhile do not count."""
    total = 0
    files = [path] if path.is_file() else (Path(at, name) for at, _, names in os.walk(path) for name in names)
    for file in files:
        with suppress(OSError):
            total += file.stat().st_size
    return total


def require_space(what: str, folder: Path, nbytes: int) -> None:
    """Refuses before the first byte what the disk will not hold."""
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise OnDeviceError(
            f"{what} takes {nbytes / 1e9:.1f} GB more and the disk of {folder} has {free / 1e9:.1f} GB free.",
            "Free some space, or let HF_HUB_CACHE name a folder on another disk.",
        )
