"""GGUF versions 2 and 3, read without trusting a single count: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Every count is held against the bytes that are left before anything is allocated for it. Metadata arrays are only
walked over when the file is opened (a vocabulary has hundreds of thousands of strings) and decoded when asked for.
"""

from __future__ import annotations

import itertools
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadFile, Unsupported
from ..schemes import block_size, row_bytes
from ..tensors import STORAGE, Blocks, Dense
from .files import Entry, Mapped, check_overlaps, damaged

MAGIC = b"GGUF"
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf$")  # how llama.cpp calls the parts of a split model
STRING, ARRAY = 8, 9
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
MAX_DIMS = 4
GUESSED_BYTES = 32  # of a string in a list, with its length, on average
MAX_TENSORS = MAX_KEYS = 1 << 20  # far beyond any model; bounds what a hostile header can make us hold

DENSE_TYPES = {
    0: "float32", 1: "float16", 24: "int8", 25: "int16", 26: "int32", 27: "int64", 28: "float64", 30: "bfloat16",
}  # fmt: skip
BLOCK_TYPES = {
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    39: "MXFP4",
}
OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4",
}  # fmt: skip

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class Metadata(Mapping[str, Any]):
    """A GGUF's keys and values as plain Python: numbers, strings, lists. Arrays are decoded at first use.

    Reading a value raises BadFile when its bytes are not what their type says (text that isn't UTF-8).
    """

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._pending: dict[str, Callable[[], Any]] = {}

    def __getitem__(self, key: str) -> Any:
        if key in self._pending:
            self._values[key] = self._pending[key]()
            del self._pending[key]
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def _later(self, key: str, decode: Callable[[], Any]) -> None:
        self._values[key], self._pending[key] = None, decode


class _Reader:
    """A position in a mapped file that only moves over bytes that are there."""

    def __init__(self, file: Mapped):
        self.file, self.map, self.path, self.pos = file, file.map, file.path, 0

    def skip(self, count: int, what: str) -> int:
        """Move over `count` bytes; returns where they start."""
        start = self.pos
        if count > self.file.size - start:
            raise damaged(self.path, f"it ends within {what}")
        self.pos = start + count
        return start

    def u32(self, what: str) -> int:
        return _U32.unpack_from(self.map, self.skip(4, what))[0]

    def u64(self, what: str) -> int:
        return _U64.unpack_from(self.map, self.skip(8, what))[0]

    def count(self, least: int, what: str, most: int = 1 << 63) -> int:
        """A count of things that take at least `least` bytes each."""
        n = self.u64(what)
        if n > min((self.file.size - self.pos) // least, most):
            raise damaged(self.path, f"it claims {n} {what}, more than fit into the file")
        return n

    def text(self, what: str) -> str:
        n = self.count(1, f"bytes of {what}")
        start = self.skip(n, what)
        return self.decode(start, n, what)

    def decode(self, start: int, length: int, what: str) -> str:
        try:
            return str(self.map[start : start + length], "utf-8")
        except UnicodeDecodeError:
            raise damaged(self.path, f"{what} is not UTF-8 text") from None

    def scalar(self, kind: int, what: str) -> Any:
        dtype = np.dtype(SCALARS[kind])
        start = self.skip(dtype.itemsize, what)
        return np.frombuffer(self.map, dtype, 1, start)[0].item()


def read_model(path: Path) -> tuple[Metadata, dict[str, Entry]]:
    """What `read` gives, of a file and, where it is one part of a split model, of all parts beside it: the metadata of
    the first, the tensors of all. Raises BadFile for parts that are missing or don't belong together."""
    metadata, entries = read(Mapped(path))
    count = _parts(metadata)
    if count == 1:
        return metadata, entries
    parts = [read(Mapped(part)) for part in _beside(path, count)]
    joined: dict[str, Entry] = {}
    for number, (known, found) in enumerate(parts):
        if (known.get("split.no"), _parts(known)) != (number, count) or joined.keys() & found.keys():
            raise damaged(path, f"its part {number + 1} of {count} does not belong to it")
        joined |= found
    if len(joined) != parts[0][0].get("split.tensors.count", len(joined)):
        raise damaged(path, f"its {count} parts hold {len(joined)} tensors, not as many as they say")
    return parts[0][0], joined


def _parts(metadata: Metadata) -> int:
    """How many files the model was split into."""
    count = metadata.get("split.count", 1)
    return count if isinstance(count, int) and count > 1 else 1


def first_parts(paths: Sequence[Path]) -> list[Path]:
    """Of each split model its first part, and every file that is none."""
    return [path for path in paths if not (found := PART.match(path.name)) or found[2] == "00001"]


def _beside(path: Path, count: int) -> list[Path]:
    """All parts, by their names."""
    found = PART.match(path.name)
    if not found or int(found[3]) != count:
        raise BadFile(
            f"{path} is one of {count} parts of a model, but not called so.",
            f"Call them NAME-00001-of-{count:05}.gguf and so on, or join them: llama-gguf-split --merge.",
        )
    paths = [path.with_name(f"{found[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = next((part for part in paths if not part.is_file()), None)
    if missing:
        raise BadFile(f"{path} is one of {count} parts of a model, and {missing} is not there.", "Fetch all of them.")
    return paths


def read(file: Mapped) -> tuple[Metadata, dict[str, Entry]]:
    """Metadata and the place of every tensor, shapes as [out, in].

    Raises BadFile for anything that doesn't add up, Unsupported for a version or a tensor type that isn't read here.
    """
    reader = _Reader(file)
    if file.map[:4] != MAGIC:
        raise BadFile(f"{file.path} is not a GGUF file.", "Give a .gguf file or a Hugging Face folder.")
    reader.skip(4, "its first bytes")
    _check_version(reader)
    tensors = reader.count(24, "tensors", MAX_TENSORS)
    keys = reader.count(13, "metadata keys", MAX_KEYS)
    metadata = Metadata()
    for _ in range(keys):
        _read_pair(reader, metadata)
    return metadata, _read_tensors(reader, tensors, _alignment(file.path, metadata))


def _check_version(reader: _Reader) -> None:
    version = reader.u32("its version")
    if version in (2, 3):
        return
    what = "is a big-endian GGUF" if version and version & 0xFFFF == 0 else f"is GGUF version {version}"
    raise Unsupported(f"{reader.path} {what}, which is not read here.", "Get the model as GGUF 2 or 3, little-endian.")


def _alignment(path: Path, metadata: Metadata) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise damaged(path, f"its alignment is {alignment!r}, not a power of two")
    return alignment


# ------------------------------------------------------------------------------------------------ metadata


def _read_pair(reader: _Reader, metadata: Metadata) -> None:
    key = reader.text("a metadata key")
    if key in metadata:
        raise damaged(reader.path, f"it has the metadata key {key!r} twice")
    kind = reader.u32(f"the type of {key!r}")
    if kind == STRING:
        metadata._values[key] = reader.text(key)
    elif kind in SCALARS:
        metadata._values[key] = reader.scalar(kind, key)
    elif kind == ARRAY:
        metadata._later(key, _array(reader, key))
    else:
        raise damaged(reader.path, f"the metadata key {key!r} has the unknown type {kind}")


def _array(reader: _Reader, key: str) -> Callable[[], list]:
    """Move over an array; returns what decodes it. Arrays of arrays are refused, as ggml's own reader does."""
    kind = reader.u32(f"the type of {key!r}")
    if kind in SCALARS:
        dtype = np.dtype(SCALARS[kind])
        n = reader.count(dtype.itemsize, f"numbers of {key!r}")
        start = reader.skip(n * dtype.itemsize, key)
        return lambda: np.frombuffer(reader.map, dtype, n, start).tolist() if n else []
    if kind != STRING:
        raise damaged(reader.path, f"the metadata key {key!r} has an array of the unknown type {kind}")
    n = reader.count(8, f"strings of {key!r}")
    edges = _edges(reader, n, key)
    return lambda: _strings(reader, edges, key)


def _edges(reader: _Reader, count: int, key: str) -> np.ndarray:
    """Move over `count` strings; returns where each begins (with its length in eight bytes) and the last one ends."""
    edges = _guessed_edges(reader, count)
    if edges is None:
        edges = [reader.pos]
        for _ in range(count):  # each step needs the one before: for a vocabulary that takes a while
            reader.skip(reader.u64(f"the strings of {key!r}"), f"the strings of {key!r}")
            edges.append(reader.pos)
    reader.pos = int(edges[-1])
    return np.asarray(edges)


def _guessed_edges(reader: _Reader, count: int) -> np.ndarray | None:
    """The same for strings as vocabularies have them, shorter than 64 KiB and without zero bytes: the zeros in the file
    are then the lengths' high bytes, six or seven in a row. None where that does not add up."""
    octets = reader.file.octets[reader.pos : reader.pos + GUESSED_BYTES * count]
    zero = octets == 0
    six = zero
    for shift in (1, 2, 2):  # two in a row, four, six
        six = six[:-shift] & six[shift:]
    firsts = np.flatnonzero(six[1:] & ~zero[: len(six) - 1])[:count] + 1
    seven = zero[np.minimum(firsts + 6, len(zero) - 1)]
    heads = firsts - np.where(seven, 1, 2)
    if not 0 < count == len(heads) or heads[0] != 0:
        return None
    ends = heads + 8 + octets[heads] + np.where(seven, 0, octets[heads + 1].astype(int) << 8)
    if not np.array_equal(heads[1:], ends[:-1]) or reader.pos + ends[-1] > reader.file.size:
        return None
    return reader.pos + np.append(0, ends)


def _strings(reader: _Reader, edges: np.ndarray, key: str) -> list[str]:
    """What stands between those edges."""
    first = int(edges[0])
    octets = reader.file.octets[first : int(edges[-1])].copy()
    heads = (edges[:-1] - first).astype(np.int64)
    kept = np.ones(len(octets), bool)
    for i in range(1, 8):
        kept[heads + i] = False
    octets[heads] = 0  # what is left of a length parts the strings
    try:
        strings = octets[kept].tobytes().decode().split("\0")[1:]
        if len(strings) == len(heads):
            return strings
        return [str(reader.map[a + 8 : b], "utf-8") for a, b in itertools.pairwise(edges.tolist())]  # zeros in them
    except UnicodeDecodeError:
        raise damaged(reader.path, f"a string of {key!r} is not UTF-8 text") from None


# ------------------------------------------------------------------------------------------------ tensors


def _read_tensors(reader: _Reader, count: int, alignment: int) -> dict[str, Entry]:
    infos: dict[str, tuple] = {}
    for _ in range(count):
        name = reader.text("a tensor's name")
        if name in infos:
            raise damaged(reader.path, f"it has the tensor {name!r} twice")
        infos[name] = _read_info(reader, name)
    data = -(-reader.pos // alignment) * alignment
    entries = {name: _place(reader.file, name, info, data, alignment) for name, info in infos.items()}
    check_overlaps(reader.path, entries)
    return entries


def _read_info(reader: _Reader, name: str) -> tuple[tuple[int, ...], int, int]:
    """Shape as [out, in], ggml's type, offset in the data."""
    dims = reader.u32(f"the rank of {name!r}")
    if not 0 < dims <= MAX_DIMS:
        raise damaged(reader.path, f"the tensor {name!r} has {dims} dimensions")
    shape = tuple(reader.u64(f"the shape of {name!r}") for _ in range(dims))[::-1]
    if not all(shape):
        raise damaged(reader.path, f"the tensor {name!r} has the shape {list(shape)}")
    return shape, reader.u32(f"the type of {name!r}"), reader.u64(f"the offset of {name!r}")


def _place(file: Mapped, name: str, info: tuple, data: int, alignment: int) -> Entry:
    shape, kind, offset = info
    form, nbytes = _storage(file, name, shape, kind)
    if offset % alignment:
        raise damaged(file.path, f"the tensor {name!r} does not start at a multiple of {alignment}")
    if data + offset + nbytes > file.size:
        raise damaged(
            file.path,
            f"the tensor {name!r} reaches beyond the end of the file",
        )
    return Entry(file, data + offset, shape, form, nbytes)


def _storage(file: Mapped, name: str, shape: tuple[int, ...], kind: int) -> tuple[Dense | Blocks, int]:
    """Format and bytes of a tensor of ggml's type `kind`."""
    if kind in DENSE_TYPES:
        form = Dense(DENSE_TYPES[kind])
        return form, math.prod(shape) * STORAGE[form.dtype].itemsize
    if kind in BLOCK_TYPES:
        form = Blocks(BLOCK_TYPES[kind])
        if shape[-1] % block_size(form.kind):
            raise damaged(file.path, f"the rows of {name!r}, {shape[-1]} long, are not whole blocks of {form.kind}")
        return form, math.prod(shape[:-1]) * row_bytes(form.kind, shape[-1])
    if kind in OTHER_TYPES:
        raise Unsupported(
            f"{file.path} stores {name!r} as {OTHER_TYPES[kind]}, which is not read here.",
            f"Get the model as one of: F32, F16, BF16, {', '.join(BLOCK_TYPES.values())}.",
        )
    raise damaged(file.path, f"the tensor {name!r} has the unknown type {kind}")
