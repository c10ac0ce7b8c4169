"""Each weight format, defined over NumPy: what the stored bytes mean, how they are packed, how rows move.

This is the definition; backends repack for their kernels and tools choose formats. Every quantized format here but FP8
is affine in groups along the last axis: w = scale * code + bias, computed in float32, so one formula serves them all.
GGUF's block types follow ggml's layouts (one NumPy structure each); the packed affine format is MLX's; FP8 is
DeepSeek's, floats of eight bits with a scale for each 128 of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, reduce
from typing import NamedTuple

import numpy as np

from .errors import Unsupported
from .tensors import STORAGE, Affine, Blocks, Dense, Stack, Tensor, blank, floats, store

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
CHUNK = 1 << 22  # numbers converted at a time

LAYOUT = {  # kind -> one block as it lies in the file (ggml's names for the fields)
    "Q4_0": np.dtype([("d", "<f2"), ("qs", "u1", 16)]),
    "Q4_1": np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)]),
    "Q5_0": np.dtype([("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)]),
    "Q5_1": np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)]),
    "Q8_0": np.dtype([("d", "<f2"), ("qs", "u1", 32)]),
    "Q2_K": np.dtype([("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")]),
    "Q3_K": np.dtype([("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")]),
    "Q4_K": np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)]),
    "Q5_K": np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)]),
    "Q6_K": np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")]),
    "MXFP4": np.dtype([("e", "u1"), ("qs", "u1", 16)]),
    "FP8": np.dtype([("d", "<f4"), ("qs", "u1", 128)]),
}
LEGACY_BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8}  # the kinds that `to_affine` takes
CODE_BITS = LEGACY_BITS | {"Q2_K": 2, "Q3_K": 3, "Q4_K": 4, "Q5_K": 5, "Q6_K": 6, "MXFP4": 5}  # of `k_parts`
FP8, FP8_BLOCK = Blocks("FP8"), 128


def block_size(kind: str) -> int:
    """Numbers in one block of `kind`."""
    if kind == "FP8":
        return FP8_BLOCK
    return 32 if kind in LEGACY_BITS or kind == "MXFP4" else 256


def k_group(kind: str) -> int:
    """Numbers that share a scale in a block of a K-quant or MXFP4."""
    return 16 if kind in ("Q2_K", "Q3_K", "Q6_K") else 32


def label(form: Dense | Affine | Blocks) -> str:
    """A format's name for people: bfloat16, 4-bit (groups of 64), Q4_K."""
    if isinstance(form, Dense):
        return form.dtype
    return form.kind if isinstance(form, Blocks) else f"{form.bits}-bit (groups of {form.group_size})"


@lru_cache(4096)
def outline(shape: tuple[int, ...], form: Dense | Affine | Blocks) -> Tensor:
    """A tensor that takes no memory, with the `nbytes` of a real one; the same one again for the same question."""
    if not isinstance(form, Blocks):
        return blank(shape, form)
    octets = np.broadcast_to(np.uint8(0), (*shape[:-1], row_bytes(form.kind, shape[-1])))
    return Tensor(shape, form, {"weight": octets})


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of a row of `columns` numbers (a multiple of the block size)."""
    return columns // block_size(kind) * LAYOUT[kind].itemsize


# ------------------------------------------------------------------------------------------------ packed codes


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes [..., n] -> uint32 [..., n * bits / 32], MLX's way: one stream of bits, lowest first.

    Eight codes fill exactly `bits` bytes, whatever `bits` is. Raises Unsupported unless rows fill whole words.
    """
    n = codes.shape[-1]
    _check_packing(n, bits)
    if 8 % bits == 0:  # whole codes in every byte
        shifted = (codes[..., i :: 8 // bits] << np.uint8(bits * i) for i in range(8 // bits))
        return np.ascontiguousarray(reduce(np.bitwise_or, shifted)).view("<u4")
    eights = codes.reshape(*codes.shape[:-1], n // 8, 8)
    words = np.zeros(eights.shape[:-1], "<u8")
    for i in range(8):
        words |= eights[..., i].astype("<u8") << np.uint64(bits * i)
    stream = words.view(np.uint8).reshape(eights.shape)[..., :bits]
    return np.ascontiguousarray(stream).reshape(*codes.shape[:-1], n * bits // 8).view("<u4")


def unpack(weight: np.ndarray, bits: int, n: int) -> np.ndarray:
    """uint32 [..., n * bits / 32] -> uint8 codes [..., n]; the inverse of `pack`."""
    _check_packing(n, bits)
    if 8 % bits == 0:
        octets, codes = np.ascontiguousarray(weight).view(np.uint8), np.empty((*weight.shape[:-1], n), np.uint8)
        for i in range(8 // bits):
            codes[..., i :: 8 // bits] = (octets >> np.uint8(bits * i)) & np.uint8((1 << bits) - 1)
        return codes
    eights = np.zeros((*weight.shape[:-1], n // 8, 8), np.uint8)
    eights[..., :bits] = np.ascontiguousarray(weight).view(np.uint8).reshape(*weight.shape[:-1], n // 8, bits)
    words, mask = eights.view("<u8")[..., 0], np.uint64((1 << bits) - 1)
    codes = np.empty(eights.shape, np.uint8)
    for i in range(8):
        codes[..., i] = (words >> np.uint64(bits * i)) & mask
    return codes.reshape(*weight.shape[:-1], n)


def _check_packing(n: int, bits: int) -> None:
    if bits not in AFFINE_BITS:
        raise Unsupported(
            f"Codes of {bits} bits are not supported.", f"Choose from {', '.join(map(str, AFFINE_BITS))}."
        )
    if n % 8 or n * bits % 32:
        raise Unsupported(
            f"A row of {n} codes of {bits} bits does not fill whole 32-bit words.",
            "Keep this tensor dense, or choose another number of bits.",
        )


# ------------------------------------------------------------------------------------------------ GGUF blocks


class Parts(NamedTuple):
    """A quantized tensor taken apart: w = scales * codes + biases, in float32, `group_size` neighbours sharing both."""

    codes: np.ndarray  # uint8 [..., I]
    scales: np.ndarray  # float32 [..., I / group_size]
    biases: np.ndarray  # float32 [..., I / group_size]
    group_size: int


def k_parts(tensor: Tensor) -> Parts:
    """Codes, scales and biases of any Blocks tensor but FP8 (groups of 32, or 16 for Q2_K, Q3_K, Q6_K), exactly as
    `to_float` uses them: K-quants' two levels of scales are multiplied out in float32, which holds the product."""
    kind = _kind(tensor)
    blocks = _blocks(tensor)
    codes, scales, biases = _DECODE[kind](blocks)
    *rows, columns = tensor.shape
    groups = scales.reshape(*rows, -1)
    return Parts(codes.reshape(tensor.shape), groups, biases.reshape(groups.shape), columns // groups.shape[-1])


def _kind(tensor: Tensor) -> str:
    if not isinstance(tensor.format, Blocks) or tensor.format.kind not in CODE_BITS:
        raise Unsupported(f"{tensor.format} has no codes with scales and biases.", f"Known: {', '.join(CODE_BITS)}.")
    return tensor.format.kind


def _blocks(tensor: Tensor) -> np.ndarray:
    """[..., blocks per row], each a structure"""
    return np.ascontiguousarray(tensor.parts["weight"]).view(LAYOUT[tensor.format.kind])


def _fields(octets: np.ndarray, width: int) -> np.ndarray:
    """uint8 [..., n] -> [..., 8 / width, n]: the bit fields of `width`, lowest first, each for all bytes in turn."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    return (octets[..., None, :] >> shifts) & np.uint8((1 << width) - 1)


def _flat(fields: np.ndarray, rows: tuple[int, ...]) -> np.ndarray:
    return fields.reshape(*rows, -1)


def _f32(part: np.ndarray) -> np.ndarray:
    return part.astype(np.float32)[..., None]


Decoded = tuple[np.ndarray, np.ndarray, np.ndarray]  # codes [..., b, n], scales and biases [..., b, n / group]


def _legacy_codes(kind: str, b: np.ndarray) -> np.ndarray:
    if kind == "Q8_0":
        return b["qs"] ^ 0x80  # two's complement -> offset 128
    low = _flat(_fields(b["qs"], 4), b.shape)
    if "qh" not in b.dtype.names:
        return low
    return low | np.unpackbits(b["qh"], axis=-1, bitorder="little") << 4


def _legacy(kind: str) -> Callable[[np.ndarray], Decoded]:
    """Q*_1 store a minimum; the others are symmetric: code - 2^(bits - 1), times d."""
    middle = np.float32(1 << (LEGACY_BITS[kind] - 1))

    def decode(b: np.ndarray) -> Decoded:
        d = _f32(b["d"])
        return _legacy_codes(kind, b), d, _f32(b["m"]) if "m" in b.dtype.names else -middle * d

    return decode


MXFP4_ZERO = 12  # codes are twice the eight magnitudes of a 4-bit float, plus this: whole numbers from 0 to 24
_HALVES = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.int8)
_MXFP4_MIDDLES = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32)  # between neighbours
_MXFP4_CODES = np.concatenate([MXFP4_ZERO + _HALVES, MXFP4_ZERO - _HALVES]).astype(np.uint8)


def _mxfp4(b: np.ndarray) -> Decoded:
    """OCP's microscaling format: 4-bit floats (sign, two bits of exponent, one of mantissa), 32 to a power of two."""
    half = np.ldexp(np.float32(1), b["e"].astype(np.int32) - 128)[..., None]
    return _MXFP4_CODES[_flat(_fields(b["qs"], 4), b.shape)], half, -MXFP4_ZERO * half


def mxfp4_blocks(codes: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """Codes as safetensors files have them, neighbours in a byte, uint8 [..., G, 16], and their exponents [..., G] ->
    ggml's blocks, uint8 [..., G * 17]"""
    neighbours = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], 32)
    blocks = np.empty(exponents.shape, LAYOUT["MXFP4"])
    blocks["e"], blocks["qs"] = exponents, neighbours[..., :16] | neighbours[..., 16:] << 4
    return blocks.view(np.uint8).reshape(*exponents.shape[:-1], -1)


def mxfp4_parts(tensor: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The inverse, as MLX has it: codes uint32 [..., I / 8] and exponents uint8 [..., I / 32]."""
    blocks = np.ascontiguousarray(tensor.parts["weight"]).view(LAYOUT["MXFP4"])
    codes = _flat(_fields(blocks["qs"], 4), blocks.shape)
    return pack(codes.reshape(tensor.shape), 4), blocks["e"].reshape(*tensor.shape[:-1], -1)


def quantize_mxfp4(values: np.ndarray) -> Tensor:
    """float32 values [..., I] -> MXFP4 (OCP Microscaling Formats, version 1.0), bit for bit as MLX's `mx.quantize` with
    mode "mxfp4": the least power of two that reaches each block's largest number; what lies in the middle goes towards
    zero. Raises Unsupported when I is not a multiple of 32."""
    columns = values.shape[-1]
    if columns % 32:
        raise Unsupported(f"Rows of {columns} numbers cannot be cut in groups of 32.", "Keep this tensor dense.")
    groups = values.astype(np.float32, copy=False).reshape(*values.shape[:-1], -1, 32)
    share, exponents = np.frexp(np.abs(groups).max(-1) / np.float32(6))
    exponents = np.where(share > 0, exponents - (share == 0.5), 0)
    scaled = np.ldexp(groups, -exponents[..., None])
    magnitudes = np.searchsorted(_MXFP4_MIDDLES, np.abs(scaled)).astype(np.uint8)
    codes = magnitudes | np.where((scaled < 0) & (magnitudes > 0), np.uint8(8), np.uint8(0))
    stored = np.clip(exponents + 127, 0, 254).astype(np.uint8)
    blocks = mxfp4_blocks(codes[..., ::2] | codes[..., 1::2] << 4, stored)
    return Tensor(tuple(values.shape), Blocks("MXFP4"), {"weight": blocks})


def fp8_blocks(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Codes uint8 [..., I] and the scale of each 128, float32 [..., I / 128] -> blocks, uint8 [..., I / 128 * 132]"""
    blocks = np.empty(scales.shape, LAYOUT["FP8"])
    blocks["d"], blocks["qs"] = scales, codes.reshape(*scales.shape, FP8_BLOCK)
    return blocks.view(np.uint8).reshape(*scales.shape[:-1], -1)


def _q2_k(b: np.ndarray) -> Decoded:
    codes = _fields(b["qs"].reshape(*b.shape, 2, 32), 2)
    return _flat(codes, b.shape), _f32(b["d"]) * (b["scales"] & 15), -(_f32(b["dmin"]) * (b["scales"] >> 4))


def _q3_k(b: np.ndarray) -> Decoded:
    codes = _flat(_fields(b["qs"].reshape(*b.shape, 2, 32), 2), b.shape) | _flat(_fields(b["hmask"], 1), b.shape) << 2
    low, high = _fields(b["scales"][..., :8], 4), _fields(b["scales"][..., 8:], 2)
    six = _flat(low, b.shape) | _flat(high, b.shape) << 4
    scales = _f32(b["d"]) * (six.astype(np.float32) - 32)
    return codes, scales, -4 * scales


def _six_bit_pairs(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Q4_K's and Q5_K's 12 bytes -> eight 6-bit scales and eight 6-bit minimums."""
    a, b, c = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([a & 63, (c & 15) | (a >> 6) << 4], axis=-1)
    return scales, np.concatenate([b & 63, (c >> 4) | (b >> 6) << 4], axis=-1)


def _q4_k(b: np.ndarray) -> Decoded:
    codes = _flat(_fields(b["qs"].reshape(*b.shape, 4, 32), 4), b.shape)
    scales, minimums = _six_bit_pairs(b["scales"])
    return codes, _f32(b["d"]) * scales, -(_f32(b["dmin"]) * minimums)


def _q5_k(b: np.ndarray) -> Decoded:
    codes, scales, biases = _q4_k(b)
    return codes | _flat(_fields(b["qh"], 1), b.shape) << 4, scales, biases


def _q6_k(b: np.ndarray) -> Decoded:
    low = _flat(_fields(b["ql"].reshape(*b.shape, 2, 64), 4), b.shape)
    high = _flat(_fields(b["qh"].reshape(*b.shape, 2, 32), 2), b.shape)
    scales = _f32(b["d"]) * b["scales"]
    return low | high << 4, scales, -32 * scales


_DECODE: dict[str, Callable[[np.ndarray], Decoded]] = {
    **{kind: _legacy(kind) for kind in LEGACY_BITS},
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "MXFP4": _mxfp4,
}


# ------------------------------------------------------------------------------------------------ conversions


def parts(tensor: Tensor) -> Parts:
    """Codes, scales and biases of any quantized tensor."""
    if isinstance(tensor.format, Blocks):
        return k_parts(tensor)
    form, stored = tensor.format, tensor.parts
    codes = unpack(stored["weight"], form.bits, tensor.shape[-1])
    return Parts(codes, floats(stored["scales"], form.dtype), floats(stored["biases"], form.dtype), form.group_size)


def to_float(tensor: Tensor) -> np.ndarray:
    """The tensor's numbers as float32, in its logical shape. A dense float32 tensor is returned as it is."""
    if isinstance(tensor.format, Dense):
        return floats(tensor.parts["weight"], tensor.format.dtype)
    if tensor.format == FP8:
        blocks = _blocks(tensor)
        return (floats(blocks["qs"], "float8_e4m3fn") * blocks["d"][..., None]).reshape(tensor.shape)
    codes, scales, biases, group = parts(tensor)
    values = codes.reshape(*scales.shape, group) * scales[..., None]
    values += biases[..., None]
    return values.reshape(tensor.shape)


def to_affine(tensor: Tensor) -> Tensor:
    """Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0 in MLX's convention, groups of 32, every code kept as it is.

    Scales and biases stay float16, which holds them exactly, unless a bias (-8 d, -16 d or -128 d) would overflow:
    then both are float32. Raises Unsupported for other formats.
    """
    kind = _kind(tensor)
    if kind not in LEGACY_BITS:
        raise Unsupported(
            f"{kind} has no exact form with float16 scales per group of 32.",
            "Choose a dense type for it: --dtype bfloat16 (or float16, float32).",
        )
    bits, columns = LEGACY_BITS[kind], tensor.shape[-1]
    weight = np.empty((*tensor.shape[:-1], columns * bits // 32), np.uint32)
    scales, biases = np.empty((2, *tensor.shape[:-1], columns // 32), np.float32)
    for chosen, chunk in _chunks(tensor):
        codes, scales[chosen], biases[chosen], _ = k_parts(chunk)
        weight[chosen] = pack(codes, bits)
    dtype = "float32" if (np.abs(biases) > np.finfo(np.float16).max).any() else "float16"
    stored = {"weight": weight, "scales": store(scales, dtype), "biases": store(biases, dtype)}
    return Tensor(tensor.shape, Affine(bits, 32, dtype), stored)


def to_dense(tensor: Tensor, dtype: str) -> Tensor:
    """The tensor in float32, float16 or bfloat16, rounded to nearest; one that is so already is returned as it is."""
    form = Dense(dtype)
    if tensor.format == form:
        return tensor
    weight = np.empty(tensor.shape, STORAGE[dtype])
    for chosen, chunk in _chunks(tensor):
        weight[chosen] = store(to_float(chunk), dtype)
    return Tensor(tensor.shape, form, {"weight": weight})


def _chunks(tensor: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The tensor in runs of rows (first axis), so that what is made of them on the way stays small."""
    count = tensor.shape[0]
    step = max(1, CHUNK * count // max(tensor.size, 1))
    for start in range(0, count, step):
        chosen = slice(start, min(start + step, count))
        cut = {name: part[chosen] for name, part in tensor.parts.items()}
        yield chosen, Tensor((chosen.stop - start, *tensor.shape[1:]), tensor.format, cut)


def quantize_affine(values: np.ndarray, bits: int, group_size: int, dtype: str) -> Tensor:
    """float32 values [..., I] -> Affine, rounding to nearest, bit for bit as MLX's `mx.quantize`.

    Each group's number farthest from zero (the edge) is hit exactly, and so is zero. Scales and biases are stored as
    `dtype`. Raises Unsupported when I is not a multiple of `group_size` or rows don't fill words.
    """
    columns = values.shape[-1]
    _check_packing(columns, bits)
    if columns % group_size:
        raise Unsupported(
            f"Rows of {columns} numbers cannot be cut in groups of {group_size}.", "Choose a smaller group size."
        )
    groups = values.astype(np.float32, copy=False).reshape(*values.shape[:-1], -1, group_size)
    scales, biases = _fit(groups, np.float32((1 << bits) - 1))
    codes = np.rint((groups - biases[..., None]) / scales[..., None])
    codes = np.clip(codes, 0, (1 << bits) - 1).astype(np.uint8).reshape(values.shape)
    stored = {"weight": pack(codes, bits), "scales": store(scales, dtype), "biases": store(biases, dtype)}
    return Tensor(tuple(values.shape), Affine(bits, group_size, dtype), stored)


def _fit(groups: np.ndarray, steps: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """MLX's choice of scale and bias for groups [..., group_size]."""
    low, high = groups.min(-1), groups.max(-1)
    negative = np.abs(low) > np.abs(high)
    scales = np.maximum((high - low) / steps, np.float32(1e-7))
    scales = np.where(negative, scales, -scales)
    edges = np.where(negative, low, high)
    counts = np.rint(edges / scales)
    some = counts != 0
    scales = np.where(some, edges / np.where(some, counts, 1), scales)
    return scales, np.where(some, edges, np.float32(0))


# ------------------------------------------------------------------------------------------------ rows


def take_rows(tensor: Tensor, rows: np.ndarray | Sequence[int]) -> Tensor:
    """Rows (first axis: outputs of a matrix, numbers of a vector, experts of a stack) in the given order, any format:
    a row's bytes are never looked into."""
    rows = np.asarray(rows)
    taken = {name: part[rows] for name, part in tensor.parts.items()}
    return Tensor((len(rows), *tensor.shape[1:]), tensor.format, taken)


def take_columns(tensor: Tensor, columns: np.ndarray) -> Tensor:
    """Columns (last axis: inputs of a matrix) in the given order, as many as there are. Codes move with their groups;
    float32 where the order would part neighbours that share a scale."""
    form = tensor.format
    span = block_size(form.kind) if isinstance(form, Blocks) else form.group_size if isinstance(form, Affine) else 1
    groups = columns.reshape(-1, span)[:, :1]
    if (groups % span).any() or not np.array_equal(columns, (groups + np.arange(span)).ravel()):
        return Tensor(tensor.shape, Dense("float32"), {"weight": to_float(tensor)[..., columns]})
    order = groups.ravel() // span
    moved = {
        name: part.reshape(*part.shape[:-1], len(order), -1)[..., order, :].reshape(part.shape)
        for name, part in tensor.parts.items()
    }
    return Tensor(tensor.shape, form, moved)


def row(tensor: Tensor, index: int) -> Tensor:
    """One row of the first axis, without it (an expert of a stack), as a view."""
    if isinstance(tensor, Stack):
        return tensor.piece(index)
    return Tensor(tensor.shape[1:], tensor.format, {name: part[index] for name, part in tensor.parts.items()})


def rows(tensor: Tensor, ids: np.ndarray | Sequence[int]) -> np.ndarray:
    """float32 [*ids.shape, *tensor.shape[1:]]: only these rows are read and dequantized (embedding lookup)."""
    ids = np.asarray(ids)
    return to_float(take_rows(tensor, ids.reshape(-1))).reshape(*ids.shape, *tensor.shape[1:])


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """E tensors of one shape and format -> one [E, ...] in that format (experts); Unsupported when they differ."""
    first = tensors[0]
    odd = next((t for t in tensors if (t.shape, t.format) != (first.shape, first.format)), None)
    if odd is not None:
        raise Unsupported(
            f"Tensors that should be stacked differ: {first.format} {first.shape} and {odd.format} {odd.shape}.",
            "Convert the model to one type first: ondevice convert --dequantize.",
        )
    stacked = {name: np.stack([t.parts[name] for t in tensors]) for name in first.parts}
    return Tensor((len(tensors), *first.shape), first.format, stacked)
