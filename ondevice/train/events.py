"""What a training run tells while it goes on: the command line, tests and other tools consume the same events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Started:
    """steps: in all; done: of these, before a resumed run goes on. micro_batch and remat: what the planner chose, for
    an expected use of `memory` bytes. parameters: numbers that are trained."""

    steps: int
    done: int
    parameters: int
    micro_batch: int
    remat: bool
    memory: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepDone:
    """One line of metrics.jsonl. loss: the mean over the step's targets, before its update. tokens_per_second: input
    tokens, padding apart, over the step's time. validation_loss: where it was measured behind this step."""

    step: int
    loss: float
    tokens_per_second: float
    peak_memory_bytes: int
    learning_rate: float
    gradient_norm: float
    validation_loss: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Validating:
    done: int  # batches
    total: int


@dataclass(frozen=True)
class Saved:
    """A checkpoint stands: `--resume` would go on behind this step."""

    step: int
    path: Path


@dataclass(frozen=True)
class Finished:
    """step: how many were made; kept: the step whose state was kept. stopped_early: validation no longer improved.
    parameters: what was kept, by name, float32; none for a run that had ended before."""

    step: int
    kept: int
    loss: float | None
    validation_loss: float | None
    stopped_early: bool
    parameters: Mapping[str, np.ndarray] = field(repr=False, default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """All but the parameters."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "parameters"}


Event = Started | StepDone | Validating | Saved | Finished
