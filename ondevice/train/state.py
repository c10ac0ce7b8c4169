"""All that a run is at a moment, in one file that is replaced as a whole: trained parameters, the optimizer's moments,
the best so far, counters. Order, schedule and noise are functions of the step's number and need no keeping."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..backends.base import A, Backend
from ..errors import BadFile, OnDeviceError

FILE = "checkpoint.safetensors"


@dataclass(frozen=True)
class State:
    """Behind `step` steps. stale: validations since the best; best: the parameters then, None without validation."""

    params: Mapping[str, A]
    moments: dict[str, A] = field(default_factory=dict)
    step: int = 0
    best: Mapping[str, A] | None = None
    best_step: int = 0
    best_loss: float | None = None
    stale: int = 0

    def judged(self, loss: float) -> State:
        """After a validation. What is no number is no improvement."""
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            return replace(self, best=self.params, best_step=self.step, best_loss=loss, stale=0)
        return replace(self, stale=self.stale + 1)


def save(folder: Path, state: State, ops: Backend) -> Path:
    """Whole or not at all: the file before stays until this one is on the disk. Raises OnDeviceError."""
    groups = {"param": state.params, "moment": state.moments, "best": state.best or {}}
    tensors = {
        f"{group}:{name}": np.ascontiguousarray(ops.numpy(a)) for group, of in groups.items() for name, a in of.items()
    }
    counters = {"step": state.step, "best_step": state.best_step, "best_loss": state.best_loss, "stale": state.stale}
    path = folder / FILE
    room = folder / f".{FILE}.partial"  # a folder: the library writes beside what it is told, first
    try:
        shutil.rmtree(room, ignore_errors=True)
        room.mkdir()
        save_file(tensors, room / FILE, {"counters": json.dumps(counters)})
        with open(room / FILE, "rb") as file:
            os.fsync(file.fileno())
        (room / FILE).replace(path)
        room.rmdir()
    except (OSError, SafetensorError) as error:
        shutil.rmtree(room, ignore_errors=True)
        kept = "The checkpoint before is still there: free some space and go on with --resume."
        what = getattr(error, "strerror", None) or str(error).rpartition("I/O error: ")[2].partition(" (os error")[0]
        raise OnDeviceError(
            f"The checkpoint {path} could not be written: {what}.",
            kept if path.exists() else "Free some space, or choose another place, and start again.",
        ) from None
    return path


def load(folder: Path, ops: Backend) -> State | None:
    """None where there is none. Raises BadFile for a damaged one."""
    path = folder / FILE
    if not path.is_file():
        return None
    groups: dict[str, dict[str, A]] = {"param": {}, "moment": {}, "best": {}}
    try:
        with safe_open(path, "np") as file:
            counters: dict[str, Any] = json.loads(file.metadata()["counters"])
            for key in file.keys():  # noqa: SIM118  (a file of the library, no mapping)
                group, _, name = key.partition(":")
                groups[group][name] = ops.array(file.get_tensor(key), "float32")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise BadFile(f"{path} is damaged: {error}.", "Remove it and train again.") from None
    return State(groups["param"], groups["moment"], best=groups["best"] or None, **counters)
