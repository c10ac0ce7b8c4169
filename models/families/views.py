"""How a checkpoint may hold one of our tensors within another: transposed, or as some of its rows.

A name map says so behind the tensor's name: `….c_attn.weight|T`, `….input_linear.weight|first`; `|heads`: the rows of
all heads one after the other, where ours has them apart; `|kernels` are a convolution's, ours [C, taps], in files
[C, 1, taps], in MLX's [C, taps, 1]; `|grouped`: ours lie by key head; `|flat`: ours is a vector;
`|unit`: in files there is an axis of one in front; `|paired`: in files each key head's rows of both parts lie together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ...schemes import to_dense, to_float
from ...tensors import Dense, Tensor, dense
from ..config import DeltaConfig, Mixer

ROWS = {  # of the rows that a stored tensor has for each expert or head: those that are ours, n of `total`
    "first": lambda n, total: slice(n),
    "last": lambda n, total: slice(total - n, total),
    "even": lambda n, total: slice(0, None, 2),
    "odd": lambda n, total: slice(1, None, 2),
}


def viewed(
    tensor: Tensor, views: Sequence[str], shape: Sequence[int], bias: bool, mixer: Mixer | None = None
) -> Tensor:
    """What of a stored tensor is ours, which has `shape`; bias: its last axis is of rows, not of columns; mixer: its
    layer's. A quantized tensor that is transposed becomes float32, for its groups run along the wrong axis."""
    if not views:
        return tensor
    if "T" in views and not isinstance(tensor.format, Dense):
        tensor = dense(to_float(tensor))
    parts = dict(tensor.parts)
    if "paired" in views:
        order = np.arange(tensor.shape[0]).reshape(mixer.key_heads, 2, -1).swapaxes(0, 1).ravel()
        parts = {key: part[order] for key, part in parts.items()}
    parts = {key: _view(part, views, shape, bias) for key, part in parts.items()}
    if "grouped" in views:
        parts = {key: part[by_key_head(mixer)] for key, part in parts.items()}
    parts = {key: np.ascontiguousarray(part) for key, part in parts.items()}
    return Tensor(viewed_shape(tensor.shape, views, shape, bias), tensor.format, parts)


WRITTEN = {"T", "kernels", "heads", "unit", "flat", "grouped", *ROWS}  # those that can be undone


def stored(tensors: Sequence[Tensor], views: Sequence[Sequence[str]], bias: bool, mixer: Mixer | None = None) -> Tensor:
    """Tensors of ours, of one format, as a file has them in one: `viewed`, undone. views: of each; mixer: as there."""
    shape = stored_shape([t.shape for t in tensors], views, bias, mixer)
    if "raised" in views[0]:
        return to_dense(dense(to_float(tensors[0]) + np.float32(1)), tensors[0].format.dtype)
    if len(tensors) == 1 and shape == tensors[0].shape and not {"T", "grouped"} & {*views[0]}:
        return tensors[0]
    order = sorted(range(len(tensors)), key=lambda i: min(set(views[i]) & set(ROWS), default=""))
    parts = {}
    for key in tensors[0].parts:
        whole = _together([tensors[i].parts[key] for i in order], "even" in views[order[0]], bias)
        whole = whole[np.argsort(by_key_head(mixer))] if "grouped" in views[0] else whole
        whole = whole.swapaxes(-1, -2) if "T" in views[0] else whole.reshape(*shape[:-1], -1)
        parts[key] = np.ascontiguousarray(whole)
    return Tensor(shape, tensors[0].format, parts)


def by_key_head(mixer: DeltaConfig) -> np.ndarray:
    """All heads' queries, then keys, then values -> of each key head its own, where they lie so."""
    if not mixer.grouped:
        return np.arange(2 * mixer.keys + mixer.values)
    channels = np.split(np.arange(2 * mixer.keys + mixer.values), (mixer.keys, 2 * mixer.keys))
    return np.concatenate([part.reshape(mixer.key_heads, -1) for part in channels], axis=1).ravel()


def _together(parts: Sequence[np.ndarray], alternating: bool, bias: bool) -> np.ndarray:
    """Rows of several, one after the other or in turn."""
    axis = -1 if bias else -2
    if len(parts) == 1 or not alternating:
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)
    rows = len(parts) * parts[0].shape[axis]
    shape = parts[0].shape
    return np.stack(parts, axis).reshape(*shape[:axis], rows, *([] if bias else shape[-1:]))


def stored_shape(
    shapes: Sequence[Sequence[int]], views: Sequence[Sequence[str]], bias: bool, mixer: Mixer | None = None
) -> tuple[int, ...]:
    shape, axis = list(shapes[0]), -1 if bias else -2
    if len(shapes) > 1:
        shape[axis] = sum(s[axis] for s in shapes)
    if "heads" in views[0]:
        shape = [math.prod(shape)] if bias else [math.prod(shape[:-1]), shape[-1]]
    if "T" in views[0]:
        shape[-2:] = shape[-1], shape[-2]
    if "unit" in views[0]:
        return 1, *shape
    if "flat" in views[0]:  # gains of each head
        return shape[0] // mixer.head_dim, mixer.head_dim
    if "filters" in views[0]:  # kernels, as MLX has them
        return *shape, 1
    return (shape[0], 1, *shape[1:]) if "kernels" in views[0] else tuple(shape)


def viewed_shape(stored: Sequence[int], views: Sequence[str], shape: Sequence[int], bias: bool) -> tuple[int, ...]:
    """The shape that `viewed` gives; that of the stored tensor where it cannot be seen so."""
    try:
        return _view(np.broadcast_to(np.int8(0), stored), views, shape, bias).shape
    except ValueError:
        return tuple(stored)


def _view(part: np.ndarray, views: Sequence[str], shape: Sequence[int], bias: bool) -> np.ndarray:
    for view in views:
        if view in ("grouped", "paired"):  # an order, see `viewed`
            continue
        if view == "unit":
            part = part.reshape(part.shape[1:]) if part.shape[0] == 1 else part
            continue
        if view == "flat":
            part = part.reshape(-1)
            continue
        if view == "row":  # a matrix of one row, stored as a vector
            part = part.reshape(1, -1)
            continue
        if view == "heads":  # parted with the rows below
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
