"""An adapter's change worked into the weight itself, on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..schemes import to_float
from ..tensors import Tensor
from .adapter import LowRank


def merged(base: Tensor, updates: Sequence[tuple[LowRank, float]], embedding: bool = False) -> np.ndarray:
    """float32 [O, I], or [E, O, I]: the weight plus each update's change times its weight."""
    own = to_float(base)
    values = np.array(own)
    for update, weight in updates:
        adapted = _product(update, embedding)
        if update.magnitude is None:
            adapted *= np.float32(weight)
            values += adapted
            continue
        adapted += own
        axis = 0 if embedding else -1
        norms = np.sqrt(np.square(adapted, dtype=np.float64).sum(axis, keepdims=True))
        gain = to_float(update.magnitude).reshape(norms.shape) / norms
        adapted *= gain.astype(np.float32)
        adapted -= own
        values += np.float32(weight) * adapted
    return values


def _product(update: LowRank, embedding: bool) -> np.ndarray:
    """scale * up . down, in the weight's own arrangement."""
    down, up = to_float(update.down), to_float(update.up)
    scaled = up * np.float32(update.scale)
    return down @ scaled.T if embedding else scaled @ down
