"""What pruning says while it works, and at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..teaching import Taught


@dataclass(frozen=True)
class Score:
    """What speaks for a part of the model, and how much of it stays."""

    name: str
    value: float
    stays: int
    of: int = 1


@dataclass(frozen=True)
class Scores:
    """kind: of part (tokens, layers, …). meaning: of a score, for people. rows: as many as help; verdict: what is
    true of those that stay."""

    kind: str
    meaning: str
    rows: tuple[Score, ...]
    verdict: str = "stays"


@dataclass(frozen=True)
class Size:
    """parameters: numbers in all tensors; nbytes: of them as stored; nonzero: that are not zero, where that was
    counted."""

    parameters: int
    nbytes: int
    nonzero: int | None = None


@dataclass(frozen=True)
class Result:
    """path: what was written, None for a rehearsal. scores: by what was chosen. sizes: kind of part -> how many there
    were, how many are left. notes: what could not be done as asked, for people. healed:
    where it was asked for. seconds: it took."""

    path: Path | None
    before: Size
    after: Size
    scores: tuple[Scores, ...]
    sizes: Mapping[str, tuple[int, int]]
    notes: tuple[str, ...] = ()
    healed: Taught | None = None
    seconds: float = 0.0

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Result:
        """What `asdict` made of one that is not healed yet, and JSON of that."""
        scores = [{**kind, "rows": tuple(Score(**row) for row in kind["rows"])} for kind in record["scores"]]
        parts = {
            "before": Size(**record["before"]),
            "after": Size(**record["after"]),
            "scores": tuple(Scores(**kind) for kind in scores),
            "sizes": {kind: tuple(counts) for kind, counts in record["sizes"].items()},
            "notes": tuple(record["notes"]),
        }
        return cls(**{**record, **parts})
