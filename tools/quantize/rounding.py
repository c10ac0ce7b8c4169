"""Numbers into codes: to the nearest value, in pieces on all cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from ...schemes import quantize_affine
from ...tensors import Affine, Tensor

PIECE = 1 << 18  # numbers rounded in one go: what is made of them stays in the cache

T, R = TypeVar("T"), TypeVar("R")


def nearest(values: np.ndarray, form: Affine) -> Tensor:
    """float32 values [..., I] as mx.quantize rounds them."""
    flat = values.reshape(-1, values.shape[-1])
    step = max(1, PIECE // flat.shape[-1])
    pieces = [flat[at : at + step] for at in range(0, len(flat), step)]
    made = side_by_side(lambda piece: quantize_affine(piece, form.bits, form.group_size, form.dtype), pieces)
    parts = {
        name: np.concatenate([m.parts[name] for m in made]).reshape(*values.shape[:-1], -1) for name in made[0].parts
    }
    return Tensor(tuple(values.shape), form, parts)


def side_by_side(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """work of each, on all the cores that this process may use: NumPy lets go of the interpreter where it computes."""
    with ThreadPoolExecutor(workers()) as pool:
        return list(pool.map(work, items))


def workers() -> int:
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1
