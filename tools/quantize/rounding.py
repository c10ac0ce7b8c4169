"""Numbers into codes: to the nearest value, in pieces on all cores."""

from __future__ import annotations

import numpy as np

from ...schemes import quantize_affine, quantize_mxfp4
from ...tensors import Affine, Blocks, Tensor
from .parallel import side_by_side

PIECE = 1 << 18  # numbers rounded in one go: what is made of them stays in the cache


def nearest(values: np.ndarray, form: Affine | Blocks) -> Tensor:
    """float32 values [..., I] as mx.quantize rounds them. Blocks: MXFP4."""

    def rounded(piece: np.ndarray) -> Tensor:
        if isinstance(form, Blocks):
            return quantize_mxfp4(piece)
        return quantize_affine(piece, form.bits, form.group_size, form.dtype)

    flat = values.reshape(-1, values.shape[-1])
    step = max(1, PIECE // flat.shape[-1])
    pieces = [flat[at : at + step] for at in range(0, len(flat), step)]
    made = side_by_side(rounded, pieces)
    parts = {
        name: np.concatenate([m.parts[name] for m in made]).reshape(*values.shape[:-1], -1) for name in made[0].parts
    }
    return Tensor(tuple(values.shape), form, parts)
