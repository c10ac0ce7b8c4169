"""What the contract passes in, as the kernels take it."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ..base import AttentionSpec, Step
from . import _native

KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh", "clamp", "clamped_swish")  # as in kernels.h
ACTIVATIONS = {kind: i for i, kind in enumerate(KINDS)}


@lru_cache(maxsize=8)
def ones(width: int) -> np.ndarray:
    """The gains of a norm that has none."""
    return np.ones(width, np.float32)


def native_step(step: Step) -> _native.Step:
    arrays = (step.starts, step.lengths, step.slots, step.segments)
    return _native.Step(*(None if a is None else np.ascontiguousarray(a, np.int32) for a in arrays))


@lru_cache(maxsize=64)
def native_mask(spec: AttentionSpec) -> _native.Mask:
    return _native.Mask(spec.scale, spec.window or 0, spec.chunk or 0, spec.softcap or 0.0)
