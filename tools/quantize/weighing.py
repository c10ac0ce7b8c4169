"""What every format of every matrix would cost: measured once, good for any size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ... import noise
from ...backends.base import Backend
from ...machine import cores
from ...models.config import ModelConfig
from ...models.parameters import Parameters
from ...tensors import Affine
from ..progress import Progress
from .allocation import Choice, choices
from .sensitivity import Cost, measure

TOKENS = 2048  # that errors are weighed on, at most


@dataclass(frozen=True)
class Weighed:
    """By our names: costs of errors, what they come to in each format, Hessians of embedding and head."""

    costs: Mapping[str, Cost]
    hessians: Mapping[str, np.ndarray]
    table: Mapping[str, Sequence[Choice]]


@dataclass(frozen=True)
class Given:
    """What a quantization need not find out any more: each matrix's format, the Hessians of embedding and head, and
    ids [N, T] to calibrate on (None: they are read as ever). hurried: what is not finished yet is rounded to the
    nearest values."""

    plan: Mapping[str, Affine]
    hessians: Mapping[str, np.ndarray]
    ids: np.ndarray | None = None
    hurried: bool = False


def weigh(
    config: ModelConfig, parameters: Parameters, names: Sequence[str], ops: Backend, ids: np.ndarray, seed: int,
    told: Callable[[Progress], None],
) -> Weighed:  # fmt: skip
    """names: of the matrices; ids [N, T]: calibration, of which some windows are used."""
    windows = max(1, TOKENS // ids.shape[1])
    chosen = noise.generator(seed, "sensitivity windows").permutation(len(ids))[:windows]
    for event in measure(config, parameters, ops, ids[chosen], seed):
        if isinstance(event, tuple):
            told(Progress("Measuring", *event, "steps"))
    table = {}
    with ThreadPoolExecutor(cores()) as pool:
        tried = pool.map(lambda name: choices(parameters, name, event.costs[name]), names)
        for name, several in zip(names, tried, strict=True):
            table[name] = several
            told(Progress("Trying formats", len(table), len(names), "tensors"))
    return Weighed(event.costs, event.hessians, table)
