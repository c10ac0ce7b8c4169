"""An adapter in memory: low-rank updates (and a few whole tensors) under our names, whatever file they came from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..errors import Unsupported
from ..tensors import Tensor


@dataclass(frozen=True)
class LowRank:
    """One weight's update: W + scale * up . down (LoRA, Hu et al. 2021); with `magnitude`, each row of that is brought
    to the length that stands there (DoRA, Liu et al. 2024).

    down [r, I], up [O, r], magnitude [O]; experts: down [E, r, I], up [E, O, r]. An embedding [V, D] has down [V, r],
    whose rows are looked up, up [D, r], and magnitude [D]: the lengths of its columns. Dense tensors.
    """

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.up.shape[-1]


def _distinct(array: np.ndarray) -> int:
    """Numbers in memory, of an array that may be repeated along some axes."""
    return math.prod(n for n, stride in zip(array.shape, array.strides, strict=True) if stride)


@dataclass(frozen=True)
class Adapter:
    """updates: by the name of the weight that each changes. replaced: whole tensors (biases, norms, a head) that were
    trained along. rslora: scales are alpha / sqrt(r) (Kalajdzievski 2023), which only its config file tells. dropout:
    as it was trained. base: the model that it was trained on, as its file names it. prompt [tokens, D]: embeddings that
    stand in front of every sequence (Lester et al. 2021)."""

    updates: Mapping[str, LowRank]
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    rslora: bool = False
    dropout: float = 0.0
    base: str = ""
    prompt: Tensor | None = None

    @property
    def dora(self) -> bool:
        return any(update.magnitude is not None for update in self.updates.values())

    @property
    def parameters(self) -> int:
        """Numbers that were trained: what several weights share (of one module, which the model holds apart) once."""
        tensors = [t for u in self.updates.values() for t in (u.down, u.up, u.magnitude) if t is not None]
        tensors += [] if self.prompt is None else [self.prompt]
        arrays = [part for tensor in (*tensors, *self.replaced.values()) for part in tensor.parts.values()]
        return sum({array.ctypes.data: _distinct(array) for array in arrays}.values())

    def require_weights(self, what: str) -> None:
        """Raises Unsupported for a soft prompt, which changes no weight and so cannot be `what`."""
        if self.prompt is not None:
            raise Unsupported(f"A soft prompt changes no weight: it cannot be {what}.", "Use it with --adapter.")
