"""Files that may be damaged or hostile: checked JSON, and memory maps whose pages are given back on request."""

from __future__ import annotations

import itertools
import json
import math
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadFile, Unavailable
from ..tensors import STORAGE, Blocks, Dense, Tensor, file_of

HINT = "Download or convert it again."
MAX_CONFIG = 16 << 20  # bytes


def damaged(path: Path, what: str, hint: str = HINT) -> BadFile:
    """The error for a file that isn't what it claims to be."""
    return BadFile(f"{path} is damaged: {what}.", hint)


def unreadable(path: Path, error: OSError) -> Unavailable:
    return Unavailable(f"{path} cannot be read: {error.strerror or error}.", "Check the path and its rights.")


def parse_object(raw: bytes, path: Path, what: str, hook: Callable | None = None) -> dict[str, Any]:
    """A JSON object (anything else is BadFile); `hook` is json's object_pairs_hook and may raise ValueError."""
    try:
        value = json.loads(raw, object_pairs_hook=hook)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"{what} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise damaged(path, f"{what} is not a JSON object")
    return value


def read_object(path: Path, most: int = MAX_CONFIG) -> dict[str, Any]:
    """The JSON object in a file of at most `most` bytes."""
    try:
        with open(path, "rb") as file:
            raw = file.read(most + 1)
    except OSError as error:
        raise unreadable(path, error) from None
    if len(raw) > most:
        raise damaged(path, f"it is larger than {most >> 20} MiB")
    return parse_object(raw, path, "it")


class Mapped:
    """A file mapped read-only. The map lives as long as any array made from it."""

    def __init__(self, path: Path):
        """Raises Unavailable when the file can't be opened, BadFile when it is empty."""
        self.path = path
        try:
            with open(path, "rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise damaged(path, "it is empty") from None
        except OSError as error:
            raise unreadable(path, error) from None
        self.size = len(self.map)
        self.octets = np.frombuffer(self.map, np.uint8)

    def array(self, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """A read-only view; a copy when the place is not aligned for `dtype`. The caller has checked the bounds."""
        count = math.prod(shape) * dtype.itemsize
        view = self.octets[offset : offset + count].view(dtype).reshape(shape)
        return view if view.flags.aligned else view.copy()


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: a Dense or Blocks tensor is one run of bytes in one file."""

    file: Mapped
    offset: int
    shape: tuple[int, ...]
    format: Dense | Blocks
    nbytes: int

    @property
    def places(self) -> tuple[Entry, ...]:
        """What of the file it is made of."""
        return (self,)

    def row(self, index: int) -> Entry:
        """One of the first axis, which stays, of length 1."""
        size = self.nbytes // self.shape[0]
        return Entry(self.file, self.offset + index * size, (1, *self.shape[1:]), self.format, size)

    def load(self) -> Tensor:
        if isinstance(self.format, Dense):
            stored, shape = STORAGE[self.format.dtype], self.shape
        else:
            stored, shape = np.dtype(np.uint8), (*self.shape[:-1], self.nbytes // math.prod(self.shape[:-1]))
        return Tensor(self.shape, self.format, {"weight": self.file.array(self.offset, stored, shape)})


def check_overlaps(path: Path, entries: Mapping[str, Entry]) -> None:
    """Raises BadFile when two tensors share bytes."""
    order = sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes))
    for (one, a), (other, b) in itertools.pairwise(order):
        if a.offset + a.nbytes > b.offset:
            raise damaged(path, f"the tensors {one!r} and {other!r} overlap")


def release(*tensors: Tensor) -> None:
    """Give back the memory of mapped tensors' pages (they are read again if touched); others are left alone.

    Only whole pages are dropped, so that neighbours stay resident. Tensors that lie side by side go in one call of the
    system, as each call costs as much as dropping megabytes.
    """
    held: dict[int, tuple[mmap.mmap, list[tuple[int, int]]]] = {}
    for part in (part for tensor in tensors for part in tensor.parts.values()):
        root = file_of(part)
        if root is None or not part.nbytes or not hasattr(root[0], "madvise"):
            continue
        file, first = root
        start = part.__array_interface__["data"][0] - first
        held.setdefault(first, (file, []))[1].append((start, start + part.nbytes))
    for file, spans in held.values():
        for start, end in _joined(spans):
            aligned = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            length = end // mmap.PAGESIZE * mmap.PAGESIZE - aligned
            if length > 0:
                file.madvise(mmap.MADV_DONTNEED, aligned, length)


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans of a file, those with less than a page between them as one."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and start - joined[-1][1] < mmap.PAGESIZE:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined
