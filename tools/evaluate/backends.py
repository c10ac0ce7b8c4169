"""One prompt through several backends in one process: do they compute the same thing?

Every backend runs the same prepared model in exact mode; each block's output and the logits are compared with the
reference backend's. A difference is the largest absolute one over the largest absolute value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...backends.base import Backend, Step
from ...models.config import ModelConfig
from ...models.decoder import Decoder
from ...models.parameters import Parameters

TOLERANCE = 1e-4  # of the scale, in float32 throughout


@dataclass(frozen=True)
class Comparison:
    """One backend against the reference: relative differences by tapped name, in order of computation."""

    backend: str
    device: str
    differences: dict[str, float]
    same_top1: bool

    @property
    def worst(self) -> float:
        return max(self.differences.values())

    @property
    def agrees(self) -> bool:
        return self.worst <= TOLERANCE


def observe(config: ModelConfig, parameters: Parameters, ops: Backend, ids: Sequence[int]) -> dict[str, np.ndarray]:
    """Every block's output and the logits, by name, as float32."""
    seen: dict[str, np.ndarray] = {}
    decoder = Decoder(config, ops, parameters.prepare(ops))

    def listen(name: str, x) -> None:
        if name == "logits" or name.endswith(".output"):
            seen[name] = np.array(ops.numpy(x))

    decoder.listener = listen
    decoder(ops.array(np.array([ids], np.int32)), Step.whole(1, len(ids)))
    for weight in decoder.weights.values():
        ops.release(weight)
    return seen


def compare(ops: Backend, reference: dict[str, np.ndarray], seen: dict[str, np.ndarray]) -> Comparison:
    differences = {
        name: float(np.abs(seen[name] - wanted).max() / max(np.abs(wanted).max(), 1e-30))
        for name, wanted in reference.items()
    }
    # a NaN compares as no difference at all unless it is made the largest one
    differences = {name: float("inf") if np.isnan(d) else d for name, d in differences.items()}
    same = bool((reference["logits"].argmax(-1) == seen["logits"].argmax(-1)).all())
    return Comparison(ops.name, ops.info().device, differences, same)
