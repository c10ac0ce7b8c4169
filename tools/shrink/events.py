"""What shrinking says while it works, and at its end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TIME_WAS_UP = "Time was up in the first plan: what was not rounded yet became the nearest values."


@dataclass(frozen=True)
class Outcome:
    """A plan that was carried out. loss: nats a token of the original more than the original takes for the held-out
    text; None: there was no time to measure it. expected: the loss that was foretold, where it was. failed: why there
    is no such model (the rest is None)."""

    plan: str
    nbytes: int | None
    parameters: int | None
    loss: float | None
    bits_per_byte: float | None
    seconds: float
    expected: float | None = None
    failed: str = ""


@dataclass(frozen=True)
class Estimate:
    """A plan that was not carried out, and the loss that is to be expected of it; None: there was no time to tell."""

    plan: str
    loss: float | None


@dataclass(frozen=True)
class Result:
    """chosen: the plan that is now at `path`. original: its outcome. outcomes: of plans, in the order of trial. cuts:
    of models that were only cut, with all their bits: what the estimates are made of. left: promising plans that there
    was no time for, the most promising first."""

    path: Path
    chosen: str
    original: Outcome
    outcomes: tuple[Outcome, ...]
    cuts: tuple[Outcome, ...]
    left: tuple[Estimate, ...]
    seconds: float

    @property
    def hurried(self) -> bool:
        """There was no time to carry out a single plan as it should be."""
        return all(o.failed or o.loss is None for o in self.outcomes)
