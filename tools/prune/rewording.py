"""Texts in which what went from a vocabulary comes often, so that a short time is enough to learn how it is said now.

At each place the original says how likely some token that went would have been to come instead of the one that stands
there; one of them is put in its place as if they all were `often` times as likely.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence

import numpy as np

from ... import noise
from ...backends.base import Step
from ...models.decoder import Decoder
from ..progress import Progress

FEWEST = 8  # passages that are made however long it takes
ROWS = 64  # predictions that are held at once


def reworded(
    decoder: Decoder, gone: Sequence[int], windows: list[list[int]], often: float, seed: int = 0,
    most: int | None = None, seconds: float = float("inf"),
) -> Generator[Progress, None, list[list[int]]]:  # fmt: skip
    """windows: token ids, as `decoder` knows them -> some of them, from all over the text, with more of those in
    `gone`: at most `most`, and no more than there is time for in so many seconds. often: 1 for as many as the decoder
    expects."""
    made, ids, started = [], np.array(gone, np.int64), time.perf_counter()
    order = noise.generator(seed, "reworded passages").permutation(len(windows))[:most].tolist()
    for done, number in enumerate(order):
        if done >= FEWEST and time.perf_counter() - started > seconds:
            break
        yield Progress("Putting in words of tokens that went", done, len(order), "passages")
        window = windows[number]
        draws = noise.uniform(seed, "rewording", number, (2, len(window)))
        made.append(_reworded(decoder, ids, window, often, draws) if len(ids) else window)
    return made


def _reworded(decoder: Decoder, gone: np.ndarray, window: list[int], often: float, draws: np.ndarray) -> list[int]:
    """draws [2, T], from 0 to 1: whether a place is changed, and to what. No two in a row are."""
    ops, made = decoder.ops, list(window)
    states = decoder.hidden(ops.array(np.array([window], np.int32)), Step.whole(1, len(window)))
    states, last = states.reshape(-1, decoder.config.width), -1
    for at in range(0, len(window) - 1, ROWS):
        rows = np.arange(at, min(at + ROWS, len(window) - 1), dtype=np.int32)
        logits = ops.numpy(decoder.head(decoder.scope(), ops.take(states, rows)))
        chances = np.exp(logits - logits.max(-1, keepdims=True))
        sums = np.cumsum(chances[:, gone] / chances.sum(-1, keepdims=True), -1)
        for row, sum_ in zip(rows.tolist(), sums, strict=True):
            if draws[0, row] < often * sum_[-1] and row > last:
                made[row + 1] = int(gone[min(np.searchsorted(sum_, draws[1, row] * sum_[-1]), len(gone) - 1)])
                last = row + 1
    return made
