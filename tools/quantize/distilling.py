"""Scales and biases of a quantized model trained against the original: codes stay, what they stand for moves.

The gradient of a scale is that of the weights summed over its group, each with its code (scales alone, as in
PEQA, Kim et al. 2023; here with the divergence from the original as the loss). Layer by layer: a layer's
numbers are unpacked when it runs, forward and back.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from ...backends.base import Backend
from ...checkpoint import write_folder
from ...models.families.writing import specs as laid_out
from ...registry import create_backend
from ...runtime.session import Session, open_session
from ...runtime.side_files import side_files
from ...train import Finished
from ...train.artifacts import with_scales
from ...train.learner import Teacher
from ...train.methods import Scales
from ..progress import Progress
from ..teaching import Lessons, Taught, passages, quality, settings_for, taught
from ..work import Work
from .options import Options
from .running import fingerprint, quantize
from .writing import Result

WORSE = "Distilling made it worse: scales were left as they began. Give more --minutes, or other text."
LENGTH = 256  # tokens a passage, at most: with the same time, more steps teach more than longer ones
RATE = 2e-3  # of a group's scale, a step


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
    with ExitStack() as stack:
        ops = backend if isinstance(backend, Backend) else create_backend(backend)
        original = stack.enter_context(open_session(source, backend=ops))
        student = stack.enter_context(open_session(made, backend=ops))
        better = work.path / "taught"
        shutil.rmtree(better, ignore_errors=True)
        found = _heard(_taught(original, student, better, options, work), progress)
    work.end(better if found.better else made, dest)
    notes = (*first.notes, *(() if found.better else (WORSE,)))
    return replace(first, path=dest, notes=notes, taught=found, seconds=time.perf_counter() - started)


def _heard(events: Generator[Progress, None, Taught], progress: Callable) -> Taught:
    with closing(events):  # Ctrl-C where progress is shown makes a checkpoint as well
        while True:
            try:
                progress(next(events))
            except StopIteration as end:
                return end.value


def _taught(
    original: Session, student: Session, dest: Path, options: Options, work: Work
) -> Generator[Progress, None, Taught]:
    started = time.perf_counter()
    lessons = Lessons(
        options.calibration, options.steps, options.minutes, min(LENGTH, options.window), sampled=2 * options.tokens,
        learning_rate=RATE, seed=options.seed,
    )  # fmt: skip
    data, held = yield from passages(lessons, original, student, work=work)
    first = yield from quality(original, held, "The original")
    before = yield from quality(student, held, "Before distilling", original)
    settings = settings_for(lessons, method="scales", remat=True)
    _, finished = yield from taught(student, data, settings, Teacher(original.decoder), lessons, work)
    _write(student, finished, dest)
    with open_session(dest, backend=original.backend) as made:
        after = yield from quality(made, held, "After distilling", original)
    return Taught(finished.step, finished.kept, time.perf_counter() - started, first, before, after)


def _write(student: Session, finished: Finished, dest: Path) -> None:
    pieces = with_scales(student, Scales(student), finished.parameters)
    specs = list(laid_out(student.family.names, student.config, pieces))
    write_folder(dest, student.hf_config, specs, side_files(student.checkpoint))
