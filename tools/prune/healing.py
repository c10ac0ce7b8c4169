"""A pruned model taught by the original, so that what stays makes up for what went.

LoRA on every linear map, by the divergence from the original's predictions (Hinton et al. 2015; for pruned models
Muralidharan et al. 2024), worked into the weights at the end; where tokens went, the embedding is trained whole, and
the original speaks in the tokens that stay (see translation).
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from ...checkpoint import write_folder
from ...registry import create_backend
from ...runtime.session import Session, open_session
from ...runtime.side_files import side_files
from ...train import Finished, Settings
from ...train.artifacts import as_adapter
from ...train.learner import Teacher
from ...train.methods import make_method
from ..fuse.weights import Weights
from ..progress import Progress
from ..teaching import Taught, passages, quality, settings_for, taught
from .cutting import Cut
from .rewording import more_often
from .subject import Subject
from .translation import Translation, Translator

RANK = 16
REWORDING = 0.2  # of the time, at most: passages are learnt from far slower than they are reworded
EMBEDDING = ("embed",)  # trained whole where its rows are fewer


def heal(subject: Subject, cut: Cut, pruned: Path, dest: Path) -> Generator[Progress, None, Taught]:
    """The model in `pruned`, healed, as the new folder `dest`. Raises what `passages` raises, Unsupported for models
    and backends that cannot train."""
    started, o = time.perf_counter(), subject.options
    with ExitStack() as stack:
        ops = create_backend(o.backend)
        student = stack.enter_context(open_session(pruned, backend=ops))
        original = stack.enter_context(open_session(subject.path, backend=ops))
        against = original if cut.tokens is None else None
        translation = None if cut.tokens is None else Translation(original.tokenizer, student.tokenizer, cut.tokens)
        reworded = translation and partial(
            more_often, original.decoder, list(translation.spelled), seed=o.heal.seed,
            most=o.heal.steps and o.heal.steps * o.heal.batch_size, seconds=REWORDING * 60 * o.heal.minutes,
        )  # fmt: skip
        data, held = yield from passages(o.heal, original, student, reworded)
        first = yield from quality(original, held, "The original")
        before = yield from quality(student, held, "Before healing", against)
        settings = settings_for(o.heal, rank=RANK, modules_to_save=() if cut.tokens is None else EMBEDDING)
        settings, finished = yield from taught(student, data, settings, _teacher(original, translation), o.heal)
        _write(student, finished, settings, dest)
        with open_session(dest, backend=ops) as healed:
            after = yield from quality(healed, held, "After healing", against)
    return Taught(finished.step, finished.kept, time.perf_counter() - started, first, before, after)


def _teacher(original: Session, translation: Translation | None) -> Teacher:
    if translation is None:
        return Teacher(original.decoder)
    return Translator(original.decoder, translation=translation)


def _write(student: Session, finished: Finished, settings: Settings, dest: Path) -> None:
    adapter = as_adapter(student, make_method(student, settings), finished.parameters, settings)
    weights = Weights(student.parameters, student.config, [(adapter, 1.0)])
    write_folder(dest, student.hf_config, list(weights.specs(student.family.names)), side_files(student.checkpoint))
