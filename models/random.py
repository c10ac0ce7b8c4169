"""A model of random weights with a real one's shapes: for measuring, where the weights themselves do not matter."""

from __future__ import annotations

import numpy as np

from .. import noise
from ..backends.base import Backend, W
from ..errors import BadOption
from ..tensors import Affine, Dense, Tensor, blank, dense, store
from .config import ModelConfig
from .parameters import expected


def random_tensor(name: str, shape: tuple[int, ...], bits: int, group_size: int) -> Tensor:
    """Vectors are ones. Matrices are about as large as trained ones (deviation 0.02): `bits` 16 gives bfloat16, 32
    float32, fewer give MLX's affine format, in groups of `group_size` or the largest half of it that divides a row."""
    if len(shape) == 1:
        return dense(np.ones(shape, np.float32))
    draw, form = noise.generator(0, name), random_format(name, shape, bits, group_size)
    if isinstance(form, Dense):
        values = draw.standard_normal(shape, np.float32) * np.float32(0.02)
        return Tensor(shape, form, {"weight": store(values, form.dtype)})
    groups = (*shape[:-1], shape[-1] // form.group_size)
    scale = 0.02 * 12**0.5 / 2**bits  # codes are uniform: their deviation is 2^bits / sqrt(12)
    parts = {
        "weight": draw.integers(0, 1 << 32, (*shape[:-1], shape[-1] * bits // 32), np.uint32),
        "scales": np.full(groups, scale, np.float16),
        "biases": np.full(groups, -scale * (2**bits - 1) / 2, np.float16),
    }
    return Tensor(shape, form, parts)


def random_format(name: str, shape: tuple[int, ...], bits: int, group_size: int) -> Dense | Affine:
    """What `random_tensor` makes of a parameter. Raises BadOption for rows that no group divides."""
    if len(shape) == 1 or bits in (16, 32):
        return Dense("bfloat16" if bits == 16 and len(shape) > 1 else "float32")
    while shape[-1] % group_size:
        group_size //= 2
    if group_size < 32:
        raise BadOption(f"{name} has rows of {shape[-1]}: no group of 32 or more divides them.", "Use --bits 16.")
    return Affine(bits, group_size, "float16")


def blank_weights(config: ModelConfig, bits: int = 4, group_size: int = 32) -> dict[str, Tensor]:
    """The same parameters, of zeros that take no memory."""
    shapes = expected(config).items()
    return {name: blank(shape, random_format(name, shape, bits, group_size)) for name, shape in shapes}


def random_weights(config: ModelConfig, ops: Backend, bits: int = 4, group_size: int = 32) -> dict[str, W]:
    """Every parameter, prepared; one at a time, so that memory holds the prepared model and one tensor."""
    return {n: ops.prepare(random_tensor(n, shape, bits, group_size)) for n, shape in expected(config).items()}
