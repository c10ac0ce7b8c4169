"""How much room and time a conversion will take, from a moment of each kind of its work."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ...checkpoint import Spec
from ...errors import OnDeviceError
from .planning import Format, Plan

DISK_SAMPLE = 16 << 20  # bytes written to learn how fast the disk is


@dataclass(frozen=True)
class Estimate:
    """free_bytes: on the disk to be written to. seconds: rough, for converting and writing together."""

    free_bytes: int
    seconds: float


def estimate(plan: Plan, dest: str | Path) -> Estimate:
    """Room and time for writing `plan` as `dest`. Raises OnDeviceError when there is no folder to write it to."""
    parent = Path(dest).absolute().parent
    if not parent.is_dir():
        raise OnDeviceError(f"There is no folder {parent} to write to.", "Create it first.")
    seconds = _conversion_seconds(plan) + plan.nbytes * _seconds_a_byte(parent)
    return Estimate(shutil.disk_usage(parent).free, seconds)


def _conversion_seconds(plan: Plan) -> float:
    """For each way from format to format: its smallest matrix, timed, times the numbers that go that way."""
    ways: dict[tuple[Format, Format], list[Spec]] = {}
    for source, spec in zip(plan.sources, plan.specs, strict=True):
        if source != spec.format and len(spec.shape) > 1:
            ways.setdefault((source, spec.format), []).append(spec)
    seconds = 0.0
    for specs in ways.values():
        smallest = min(specs, key=_numbers)
        start = time.perf_counter()
        smallest.load()
        seconds += (time.perf_counter() - start) / _numbers(smallest) * sum(map(_numbers, specs))
    return seconds


def _numbers(spec: Spec) -> int:
    return math.prod(spec.shape)


def _seconds_a_byte(folder: Path) -> float:
    start = time.perf_counter()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(DISK_SAMPLE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OnDeviceError(
            f"{folder} cannot be written to: {error.strerror or error}.", "Check space and rights, or choose another."
        ) from None
    return (time.perf_counter() - start) / DISK_SAMPLE
