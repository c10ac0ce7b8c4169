"""What this machine's processor can do at most, measured: reading memory, and multiplying float32 matrices."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Thread

import numpy as np

CHUNK = 64 << 20  # bytes that each thread reads: more than caches hold
SIDE = 1024  # of the matrices
REPEATS = 4  # the best counts: whatever else ran can only have slowed it down


@dataclass(frozen=True)
class Limits:
    """bytes_per_second: of memory read by as many threads as there were asked for. float32_per_second: products and
    sums of float32 matrices, by NumPy's own library and its threads. int8 products may come faster."""

    bytes_per_second: float
    float32_per_second: float


def measure(threads: int) -> Limits:
    """Takes a second or less, and `threads` times 64 MB."""
    chunks = [np.ones(CHUNK // 4, np.float32) for _ in range(threads)]
    matrix = np.ones((SIDE, SIDE), np.float32)
    reading = _best(lambda: _together([chunk.max for chunk in chunks]))
    return Limits(threads * CHUNK / reading, 2 * SIDE**3 / _best(lambda: matrix @ matrix))


def _best(work: Callable[[], object]) -> float:
    """Seconds."""
    found = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)


def _together(works: list[Callable[[], object]]) -> None:
    threads = [Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
