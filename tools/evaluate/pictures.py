"""What an evaluation looks like: how far models are from their reference, or how they do along a window."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ...pictures import lines
from .text import Evaluation

BINS = 40
FLOOR = 1e-7  # nats: below it a divergence is rounding


def draw(path: str | Path, results: Mapping[str, Evaluation]) -> None:
    """results: name -> a model's evaluation, all with or all without a reference. Raises what `pictures.lines` does."""
    if all(result.reference for result in results.values()):
        series = {Path(name).name or name: _spread(result.own.divergences) for name, result in results.items()}
        lines(path, "KL from the reference", series, "KL of a token, log10 of nats", "share of tokens")
        return
    series = {Path(name).name or name: _along(result) for name, result in results.items()}
    lines(path, "Loss along the window", series, "position in the window", "mean loss, nats a token")


def _spread(divergences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A histogram over orders of magnitude: middles of bins and shares."""
    logs = np.log10(np.maximum(divergences, FLOOR))
    counts, edges = np.histogram(logs, bins=BINS, range=(np.log10(FLOOR), max(float(logs.max()), 1.0)))
    return (edges[:-1] + edges[1:]) / 2, counts / max(len(logs), 1)


def _along(result: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    """Mean loss by position in the window, in equal bins."""
    at = np.array([i for _, i in result.places])
    width = -(-int(at.max()) // BINS)
    where = (at - 1) // width
    counts, sums = np.bincount(where), np.bincount(where, weights=result.own.losses)
    return 1 + width * np.arange(len(counts)) + (width - 1) / 2, sums / counts
