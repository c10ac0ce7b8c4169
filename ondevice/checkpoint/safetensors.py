"""Safetensors headers, read without trusting them: https://github.com/huggingface/safetensors#format"""

from __future__ import annotations

import math
from typing import Any

from ..errors import Unsupported
from ..tensors import STORAGE, Dense
from .files import Entry, Mapped, check_overlaps, damaged, parse_object

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "U32": "uint32", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
}  # fmt: skip
MAX_HEADER = 100_000_000  # the format's own limit
MAX_RANK = 8


def read(file: Mapped) -> dict[str, Entry]:
    """The place of every tensor.

    Raises BadFile for anything that doesn't add up (the format allows neither overlaps nor holes), Unsupported for a
    type that isn't read here.
    """
    if file.size < 8:
        raise damaged(file.path, "it is shorter than its header")
    length = int.from_bytes(file.map[:8], "little")
    if length > min(file.size - 8, MAX_HEADER):
        raise damaged(file.path, f"it claims a header of {length} bytes")
    header = parse_object(file.map[8 : 8 + length], file.path, "its header", _unique)
    header.pop("__metadata__", None)
    entries = {name: _entry(file, 8 + length, name, info) for name, info in header.items()}
    check_overlaps(file.path, entries)
    if 8 + length + sum(entry.nbytes for entry in entries.values()) != file.size:
        raise damaged(file.path, "it has bytes that belong to no tensor")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name appears twice")
    return values


def _entry(file: Mapped, data: int, name: str, info: Any) -> Entry:
    match info:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise damaged(file.path, f"its header lacks the type, shape or place of {name!r}")
    if dtype not in DTYPES:
        raise Unsupported(
            f"{file.path} stores {name!r} as {dtype!r}, which is not read here.", f"Known: {', '.join(DTYPES)}."
        )
    itemsize = STORAGE[DTYPES[dtype]].itemsize
    if len(shape) > MAX_RANK or not all(type(d) is int and d >= 0 for d in shape):
        raise damaged(file.path, f"the tensor {name!r} has the shape {shape!r:.80}")
    if math.prod(d or 1 for d in shape) * itemsize > 1 << 60:  # an empty tensor may hide a dimension NumPy can't hold
        raise damaged(file.path, f"the tensor {name!r} has the shape {shape!r:.80}")
    nbytes = math.prod(shape) * itemsize
    if not 0 <= begin <= end <= file.size - data or end - begin != nbytes:
        raise damaged(file.path, f"the tensor {name!r} ({dtype} {shape}) does not lie where its header says")
    return Entry(file, data + begin, tuple(shape), Dense(DTYPES[dtype]), nbytes)
