"""Host tensors into GGUF's types: codes kept where a type has room for them, else rounded to the nearest.

GGUF's blocks of 32 are affine, w = d * code + m (Q4_1, Q5_1), or without m, which is then -8, -16 or -128 times d
(Q4_0, Q5_0, Q8_0). A group of 64 or 128 is two or four such blocks with the same d and m.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...errors import BadFile, Unsupported
from ...schemes import CHUNK, FP8, LAYOUT, LEGACY_BITS, parts, take_rows, to_dense, to_float
from ...tensors import Affine, Blocks, Dense, Tensor, floats

TYPES: dict[str, Dense | Blocks] = {  # what can be written, by llama.cpp's names
    "f32": Dense("float32"), "f16": Dense("float16"), "bf16": Dense("bfloat16"),
    **{kind.lower(): Blocks(kind) for kind in ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")},
}  # fmt: skip
SYMMETRIC = ("Q4_0", "Q5_0", "Q8_0")
BLOCK = 32


@dataclass(frozen=True)
class Loss:
    """What a type costs. kept: the codes are the same, or nothing had to be rounded at all. error, size: sums of the
    squares of the differences and of the numbers."""

    kept: bool
    error: float
    size: float

    @property
    def relative(self) -> float:
        return (self.error / self.size) ** 0.5 if self.size else 0.0


def nearest(tensor: Tensor) -> Dense | Blocks:
    """The type that a tensor has, or that loses least of it at about its size."""
    form = tensor.format
    if form == FP8:
        return Dense("bfloat16")
    if not isinstance(form, Affine):
        return form if form != Dense("float64") else Dense("float32")
    if tensor.shape[-1] % BLOCK:
        return Dense("float16" if form.dtype == "float32" else form.dtype)
    kept = [kind for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0") if keeps_codes(tensor, kind)]
    return Blocks(kept[0] if kept else "Q8_0")


def keeps_codes(tensor: Tensor, kind: str) -> bool:
    """Whether blocks of `kind` hold this tensor's codes as they are (scales may still be rounded to float16)."""
    form = tensor.format
    if form == Blocks(kind):
        return True
    if not isinstance(form, Affine) or form.group_size % BLOCK:
        return False
    if kind not in SYMMETRIC:
        return form.bits <= LEGACY_BITS.get(kind, 0)
    if form.bits != LEGACY_BITS.get(kind):
        return False
    scales, biases = (floats(tensor.parts[name], form.dtype) for name in ("scales", "biases"))
    return bool((biases == scales * np.float32(-_middle(kind))).all())


def to_type(tensor: Tensor, form: Dense | Blocks) -> tuple[Tensor, Loss]:
    """The tensor in one of `TYPES`, or as it is, and what that cost it. Raises BadFile for numbers that are not finite,
    Unsupported for some that are too large for the type."""
    if tensor.format == form and isinstance(form, Blocks):
        return tensor, Loss(True, 0.0, _squares(tensor))
    kept = isinstance(form, Blocks) and keeps_codes(tensor, form.kind)
    weight: np.ndarray | None = None
    error = size = 0.0
    count = tensor.shape[0]
    step = max(1, CHUNK * count // max(tensor.size, 1))
    for start in range(0, count, step):  # what is made of a tensor on the way stays small
        chunk = take_rows(tensor, range(start, min(start + step, count)))
        size += _squares(chunk)
        made = _made(chunk, form, kept)
        error += float(np.square(to_float(chunk) - to_float(made), dtype=np.float64).sum())
        part = made.parts["weight"]
        weight = np.empty((count, *part.shape[1:]), part.dtype) if weight is None else weight
        weight[start : start + step] = part
    return Tensor(tensor.shape, form, {"weight": weight}), Loss(kept or error == 0, error, size)


def _squares(tensor: Tensor) -> float:
    total = float(np.square(to_float(tensor), dtype=np.float64).sum())
    if not np.isfinite(total):
        raise BadFile("it holds numbers that are not finite (NaN or infinity)", "Fetch or make the model again.")
    return total


def _made(chunk: Tensor, form: Dense | Blocks, kept: bool) -> Tensor:
    with np.errstate(over="ignore"):  # what becomes infinite is said below
        if isinstance(form, Dense):
            made = to_dense(chunk, form.dtype)
        else:
            made = _repacked(chunk, form.kind) if kept else _quantized(chunk, form.kind)
    if not _finite(made):
        name = form.dtype if isinstance(form, Dense) else form.kind
        raise Unsupported(f"some of its numbers are too large for {name}", "Choose --type bf16 or f32.")
    return made


def _finite(tensor: Tensor) -> bool:
    if isinstance(tensor.format, Dense):
        return tensor.format.dtype != "float16" or bool(np.isfinite(tensor.parts["weight"]).all())
    blocks = tensor.parts["weight"].view(LAYOUT[tensor.format.kind])
    return all(np.isfinite(blocks[name]).all() for name in ("d", "m") if name in blocks.dtype.names)


def _middle(kind: str) -> int:
    return 1 << (LEGACY_BITS[kind] - 1)


def _quantized(tensor: Tensor, kind: str) -> Tensor:
    """Rounded to the nearest as llama.cpp does."""
    from gguf import GGMLQuantizationType, quants

    weight = quants.quantize(to_float(tensor), GGMLQuantizationType[kind])
    return Tensor(tensor.shape, Blocks(kind), {"weight": weight})


def _repacked(tensor: Tensor, kind: str) -> Tensor:
    """An affine tensor's codes as blocks; the inverse of `schemes.to_affine`."""
    codes, scales, biases, group = parts(tensor)
    *rows, columns = tensor.shape
    codes = codes.reshape(*rows, columns // BLOCK, BLOCK)
    blocks = np.zeros(codes.shape[:-1], LAYOUT[kind])
    blocks["d"] = np.repeat(scales, group // BLOCK, -1)
    if "m" in blocks.dtype.names:
        blocks["m"] = np.repeat(biases, group // BLOCK, -1)
    if kind == "Q8_0":
        blocks["qs"] = codes ^ 0x80  # offset 128 -> two's complement
    else:
        blocks["qs"] = codes[..., :16] & 15 | (codes[..., 16:] & 15) << 4
    if "qh" in blocks.dtype.names:
        blocks["qh"] = np.packbits(codes >> 4, axis=-1, bitorder="little")
    return Tensor(tensor.shape, Blocks(kind), {"weight": blocks.view(np.uint8).reshape(*rows, -1)})
