"""A changed weight back into few bits, such that a small change is not rounded away.

The weight stands on a grid already, and what an adapter adds is often less than half of a step: rounded to the same
grid it vanishes; on a new one, all that was exact gets a new error. So a group keeps its old grid, or with k more bits
the one in which each step of the old is 2^k, wherever that leaves less error than a range of its own. What flows into
the weight, where it is known, then tells how to round on it (see feedback).
"""

from __future__ import annotations

import numpy as np

from ...schemes import LEGACY_BITS, pack, parts, quantize_affine
from ...tensors import Affine, Tensor, store
from ..quantize.fitting import stored
from .feedback import Grid, fed_back

ROWS = 1 << 20  # numbers rounded at once
Factors = list[np.ndarray] | None


def bits_of(tensor: Tensor) -> int:
    """Of a tensor whose codes a folder can keep: Affine, or one of GGUF's affine types."""
    return tensor.format.bits if isinstance(tensor.format, Affine) else LEGACY_BITS[tensor.format.kind]


def rounded(base: Tensor, values: np.ndarray, form: Affine, factors: Factors = None) -> Tensor:
    """values [..., I] float32, which differ a little from `base`, in `form`. factors: see `feedback`; for a
    matrix."""
    columns = values.shape[-1]
    flat, known = values.reshape(-1, columns), _known(base, form)
    step = max(1, ROWS // columns)
    pieces = []
    for at in range(0, len(flat), step):
        rows = slice(at, at + step)
        fresh = parts(quantize_affine(flat[rows], form.bits, form.group_size, form.dtype))
        grids = [(fresh.scales, fresh.biases), *((s[rows], b[rows]) for s, b in known)]
        pieces.append(_on_best(flat[rows], grids, form, factors))
    made = {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}
    shaped = {name: part.reshape(*values.shape[:-1], -1) for name, part in made.items()}
    return Tensor(values.shape, form, shaped)


def _known(base: Tensor, form: Affine) -> list[Grid]:
    """The grid of `base` within `form`: as it is, and moved by half of the codes that finer steps leave free, so that
    a change has room at both ends. [] where there is none."""
    if not base.quantized or (found := parts(base)).group_size != form.group_size or form.bits < bits_of(base):
        return []
    scales = (found.scales / np.float32(1 << (form.bits - bits_of(base)))).reshape(-1, found.scales.shape[-1])
    biases = found.biases.reshape(scales.shape)
    free = (1 << (form.bits - bits_of(base))) - 1
    return [(stored(scales, form), stored(biases - np.float32(at) * scales, form)) for at in {0, free // 2}]


def _on_best(values: np.ndarray, grids: list[Grid], form: Affine, factors: Factors) -> dict[str, np.ndarray]:
    """Codes, scales and biases of rows [n, I], each group on the grid that leaves it the least squared error."""
    grouped = values.reshape(len(values), -1, form.group_size)
    scales, biases = grids[0]
    codes, least = _encoded(grouped, scales, biases, form)
    for other_scales, other_biases in grids[1:]:
        other, errors = _encoded(grouped, other_scales, other_biases, form)
        better = errors < least
        codes = np.where(better[..., None], other, codes)
        scales, biases = np.where(better, other_scales, scales), np.where(better, other_biases, biases)
        least = np.minimum(errors, least)
    codes = codes.astype(np.uint8).reshape(values.shape)
    if factors:
        codes = fed_back(values, (scales, biases), form.bits, factors)
    weight = pack(codes, form.bits)
    return {"weight": weight, "scales": store(scales, form.dtype), "biases": store(biases, form.dtype)}


def _encoded(
    grouped: np.ndarray, scales: np.ndarray, biases: np.ndarray, form: Affine
) -> tuple[np.ndarray, np.ndarray]:
    """Codes [n, groups, size] and the squared error of each group."""
    usable = np.where(scales == 0, np.float32(1), scales)[..., None]
    codes = np.clip(np.rint((grouped - biases[..., None]) / usable), 0, (1 << form.bits) - 1)
    return codes, np.square(codes * scales[..., None] + biases[..., None] - grouped).sum(-1)
