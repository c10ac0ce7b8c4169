"""The picture of a run: loss, validation loss, and the step that was kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .. import pictures
from ..errors import Unavailable
from .folder import METRICS, read_metrics, read_record

FILE = "curves.png"
WIDE = 10  # how many times the lowest loss the highest must be for an axis of powers


def draw(dest: Path) -> Path | None:
    """Draws the run in `dest` beside its metrics; None where nothing can be drawn: no steps, or no matplotlib."""
    metrics = read_metrics(dest / METRICS)
    if not metrics:
        return None
    try:
        path = pictures.require(dest / FILE)
    except Unavailable:
        return None
    steps, losses = [m["step"] for m in metrics], [m["loss"] for m in metrics]
    series = {"loss": (steps, losses)}
    if len(steps) >= 40:
        series = {"loss, smoothed": (steps, _smoothed(losses))} | {"loss of a step": (steps, losses)}
    validated = [m for m in metrics if "validation_loss" in m]
    if validated:
        series["validation loss"] = [m["step"] for m in validated], [m["validation_loss"] for m in validated]
    kept = ((read_record(dest) or {}).get("ended") or {}).get("kept")
    marks = {"kept": kept} if validated and kept else None
    every = [value for _, values in series.values() for value in values]
    wide = min(every) > 0 and max(every) > WIDE * min(every)  # else the end of the run is a flat line
    pictures.lines(path, f"Training of {dest.name}", series, "step", "loss", marks, log=wide)
    return path


def _smoothed(values: list[float]) -> list[float]:
    """The mean of each value's neighbourhood, a twentieth of the run wide."""
    wide = max(3, len(values) // 20)
    padded = np.pad(values, (wide // 2, wide - 1 - wide // 2), mode="edge")
    return np.convolve(padded, np.ones(wide) / wide, mode="valid").tolist()
