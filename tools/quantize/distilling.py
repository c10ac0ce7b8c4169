"""Scales and biases of a quantized model trained against the original: codes stay, what they stand for moves.

The gradient of a scale is that of the weights summed over its group, each with its code (scales alone, as in
PEQA, Kim et al. 2023; here with the divergence from the original as the loss). Layer by layer: a layer's
numbers are unpacked when it runs, forward and back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from ...backends.base import Backend
from ...checkpoint import Spec
from ...models.families.writing import specs
from ...registry import create_backend
from ...runtime.session import Session, open_session
from ...train import Finished, Settings
from ...train.artifacts import with_scales
from ...train.methods import make_method
from ..progress import Progress, ended
from ..teaching import Lessons, Quality, Taught, Teaching, teach
from ..work import Work
from .options import Options
from .running import fingerprint, quantize
from .writing import Result

WORSE = "Distilling made it worse: scales were left as they began. Give more --minutes, or other text."
LENGTH = 256  # tokens a passage, at most: with the same time, more steps teach more than longer ones
RATE = 1.6e-3  # of a group's scale, a step, for a divergence of one nat a token


def distill(source: Path, dest: Path, options: Options, progress: Callable, backend: str | Backend) -> Result:
    """`dest`, quantized as `options.start` does it and then taught. What that made is kept in the hidden folder beside
    `dest`, as `quantize` keeps its work."""
    started = time.perf_counter()
    work = Work(dest, {"of": "distill", **fingerprint(source, options)})
    made = work.begin() / "start"
    first = work.record("start")
    if first is None or not made.is_dir():
        first = replace(quantize(source, made, replace(options, method=options.start), progress, backend), path=None)
        work.keep_record("start", vars(first))
    first = Result(**work.record("start"))
    ops = backend if isinstance(backend, Backend) else create_backend(backend)
    lessons = Lessons(
        options.calibration, options.steps, options.minutes, min(LENGTH, options.window), sampled=2 * options.tokens,
        seed=options.seed,
    )  # fmt: skip
    better = work.room("shares") / "taught"
    with open_session(source, backend=ops) as original:
        found = ended(teach_scales(original, made, better, lessons, work), progress)
    work.end(better if found.better else made, dest)
    notes = (*first.notes, *(() if found.better else (WORSE,)))
    return replace(first, path=dest, notes=notes, taught=found, seconds=time.perf_counter() - started)


def teach_scales(
    original: Session, made: Path, dest: Path, lessons: Lessons, work: Work | None = None
) -> Generator[Progress, None, Taught]:
    """The quantized model in `made`, its scales taught, as the new folder `dest`. work: where what is done is kept, and
    gone on with. Raises what `teach` raises."""
    with open_session(made, backend=original.backend) as student:
        method = {"method": "scales", "remat": True}
        learnt = partial(_learnt, student)
        teaching = Teaching(original, student, lessons, method, learnt, "distilling", rate=_rate)
        return (yield from teach(teaching, dest, work))


def _rate(before: Quality) -> float:
    """The divergence is of second order in the errors of scales: what they are off by goes with its root. Steps that
    are longer than that do more harm than good."""
    return RATE * math.sqrt(min(max(before.kl, 1e-4), 2.0))


def _learnt(student: Session, settings: Settings, finished: Finished, share: float) -> Iterable[Spec]:
    moved = {name: values * np.float32(share) for name, values in finished.parameters.items()}
    return specs(student.family.names, student.config, with_scales(student, make_method(student, settings), moved))
