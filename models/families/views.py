"""How a checkpoint may hold one of our tensors within another: transposed, or as some of its rows.

A name map says so behind the tensor's name: `….c_attn.weight|T`, `….input_linear.weight|first`; `|kernels` are a
convolution's, ours [C, taps], in files [C, 1, taps], in MLX's [C, taps, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...schemes import to_float
from ...tensors import Dense, Tensor, dense

ROWS = {  # of the rows that a stored tensor has for each expert or head: those that are ours, n of `total`
    "first": lambda n, total: slice(n),
    "last": lambda n, total: slice(total - n, total),
    "even": lambda n, total: slice(0, None, 2),
    "odd": lambda n, total: slice(1, None, 2),
}


def viewed(tensor: Tensor, views: Sequence[str], shape: Sequence[int], bias: bool) -> Tensor:
    """What of a stored tensor is ours, which has `shape`; bias: its last axis is of rows, not of columns. A quantized
    tensor that is transposed becomes float32, for its groups run along the wrong axis."""
    if not views:
        return tensor
    if "T" in views and not isinstance(tensor.format, Dense):
        tensor = dense(to_float(tensor))
    parts = {key: np.ascontiguousarray(_view(part, views, shape, bias)) for key, part in tensor.parts.items()}
    return Tensor(viewed_shape(tensor.shape, views, shape, bias), tensor.format, parts)


WRITTEN = {"T", "kernels"}  # those that can be undone


def stored(tensor: Tensor, views: Sequence[str]) -> Tensor:
    """A dense tensor of ours as files have it: `viewed`, undone."""
    if not views:
        return tensor
    shape, weight = stored_shape(tensor.shape, views), tensor.parts["weight"]
    weight = weight.swapaxes(-1, -2) if "T" in views else weight.reshape(shape)
    return Tensor(shape, tensor.format, {"weight": np.ascontiguousarray(weight)})


def stored_shape(shape: Sequence[int], views: Sequence[str]) -> tuple[int, ...]:
    if "T" in views:
        return (*shape[:-2], shape[-1], shape[-2])
    return (shape[0], 1, *shape[1:]) if "kernels" in views else tuple(shape)


def viewed_shape(stored: Sequence[int], views: Sequence[str], shape: Sequence[int], bias: bool) -> tuple[int, ...]:
    """The shape that `viewed` gives; that of the stored tensor where it cannot be seen so."""
    try:
        return _view(np.broadcast_to(np.int8(0), stored), views, shape, bias).shape
    except ValueError:
        return tuple(stored)


def _view(part: np.ndarray, views: Sequence[str], shape: Sequence[int], bias: bool) -> np.ndarray:
    for view in views:
        if view == "row":  # a matrix of one row, stored as a vector
            part = part.reshape(1, -1)
            continue
        if view == "kernels":
            part = part if bias or part.ndim < 3 else part.reshape(len(part), -1)
            continue
        if view == "T":
            part = part if bias else part.swapaxes(-1, -2)
            continue
        lead, n = (shape[:-1], shape[-1]) if bias else (shape[:-2], shape[-2])
        part = part.reshape(*lead, -1) if bias else part.reshape(*lead, -1, part.shape[-1])
        rows = ROWS[view](n, part.shape[len(lead)])
        part = part[..., rows] if bias else part[..., rows, :]
    return part
