"""The scores by which parts of a model were chosen, as a picture."""

from __future__ import annotations

from pathlib import Path

from ... import pictures
from ...errors import BadOption
from .events import Result, Score


def draw(path: Path, result: Result) -> None:
    """The first kind of part that was chosen, a bar each. Raises BadOption where nothing was scored."""
    if not result.scores:
        raise BadOption("There are no scores to draw: what goes was given.", "Leave --plot out.")
    scores = result.scores[0]
    parts = {"stays": _heights(scores.rows, True), "goes": _heights(scores.rows, False)}
    pictures.bars(path, f"What the model would miss: {scores.kind}", parts, scores.kind, scores.meaning)


def _heights(rows: tuple[Score, ...], stays: bool) -> dict[str, float]:
    """A bar for every part, of no height in the series that it does not belong to."""
    return {row.name: row.value if bool(row.stays) == stays else 0.0 for row in rows}
