"""What long work says on its way."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """How far a stage has come; unit: of done and total, for people."""

    stage: str
    done: float
    total: float
    unit: str = ""


def ended(work: Generator[Progress, None, T], told: Callable[[Progress], None] = lambda event: None) -> T:
    """What the work comes to; `told` hears of it on the way. Where that raises, as for Ctrl-C, the work is closed."""
    with closing(work):
        while True:
            try:
                event = next(work)
            except StopIteration as end:
                return end.value
            told(event)
