"""What long work says on its way."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a stage has come; unit: of done and total, for people."""

    stage: str
    done: float
    total: float
    unit: str = ""
