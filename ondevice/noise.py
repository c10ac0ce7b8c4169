"""The one source of random numbers: counter-based, on the host, the same on every backend.

A draw is a pure function of (seed, stream, counter): nothing has to be carried along, a resumed run sees what an
uninterrupted one saw, and two uses never share a sequence. Generator: Philox (Salmon et al. 2011), NumPy's.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np


def generator(seed: int, stream: str, counter: int = 0) -> np.random.Generator:
    """A generator for one use (`stream`) at one moment (`counter`, a step or a position)."""
    key = [seed & 0xFFFFFFFFFFFFFFFF, zlib.crc32(stream.encode())]
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, counter]))


def uniform(seed: int, stream: str, counter: int, shape: Sequence[int]) -> np.ndarray:
    """float32 in [0, 1)."""
    return generator(seed, stream, counter).random(tuple(shape), dtype=np.float32)
