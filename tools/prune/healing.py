"""A pruned model taught by the original, so that what stays makes up for what went.

LoRA on every linear map, by the divergence from the original's predictions (Hinton et al. 2015; for pruned models
Muralidharan et al. 2024), worked into the weights at the end, whole or in part (Wortsman et al. 2022): some of what a
short training does is noise, whose harm grows with the square of its length, and its use with the length itself. Where
tokens went, the embedding is trained whole, the original speaks in the tokens that stay (see translation), and a text
is learnt by its own next tokens as well: what it loses in words it gains in what it talks about.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ...adapters import Adapter
from ...checkpoint import write_folder
from ...registry import create_backend
from ...runtime.session import Session, open_session
from ...runtime.side_files import side_files
from ...train.artifacts import as_adapter
from ...train.learner import Teacher
from ...train.methods import make_method
from ..fuse.weights import Weights
from ..progress import Progress
from ..teaching import Lessons, Quality, Reword, Taught, passages, quality, settings_for, taught
from ..work import Work
from .rewording import reworded
from .subject import Subject
from .translation import Translation, Translator

RANK = 16
REWORDING = 0.2  # of the time, at most: passages are learnt from far slower than they are reworded
TEXT = 0.5  # of the loss, where tokens went: the text's own next tokens; the rest is the original's word
EMBEDDING = ("embed",)  # trained whole where its rows are fewer
OFTEN = 5.0  # times as likely as they are: words of tokens that went, in what is learnt from
SHARES = (1.0, 0.7, 0.4)  # of what was learnt, as long as less is better


def heal(
    subject: Subject, tokens: np.ndarray | None, pruned: Path, dest: Path, work: Work | None = None
) -> Generator[Progress, None, Taught]:
    """The model in `pruned`, healed, as the new folder `dest`. tokens: old ids of those that stayed, where not all did.
    work: where what is done is kept, and gone on with. Raises what `passages` raises, Unsupported for models and
    backends that cannot train."""
    started, o = time.perf_counter(), subject.options
    with ExitStack() as stack:
        ops = create_backend(o.backend)
        student = stack.enter_context(open_session(pruned, backend=ops))
        original = stack.enter_context(open_session(subject.path, backend=ops))
        against = original if tokens is None else None
        translation = None if tokens is None else Translation(original.tokenizer, student.tokenizer, tokens)
        rewording = translation and _rewording(o.heal, original, translation)
        data, held = yield from passages(o.heal, original, student, rewording, work)
        first = yield from quality(original, held, "The original")
        before = yield from quality(student, held, "Before healing", against)
        settings = settings_for(o.heal, rank=RANK, modules_to_save=() if tokens is None else EMBEDDING)
        teacher = _teacher(original, translation, o.heal)
        settings, finished = yield from taught(student, data, settings, teacher, o.heal, work)
        adapter = as_adapter(student, make_method(student, settings), finished.parameters, settings)
        share, after = yield from _worked_in(student, adapter, dest, held, against)
    return Taught(finished.step, finished.kept, time.perf_counter() - started, first, before, after, share)


def _rewording(lessons: Lessons, original: Session, translation: Translation) -> Reword:
    """What judges shows words of tokens that went as often as they are expected, and what the original says and is
    learnt from, often; a text that was given is learnt as it stands, for its own sake too."""
    gone, seconds = list(translation.spelled), REWORDING * 60 * lessons.minutes
    most = lessons.steps and lessons.steps * lessons.batch_size

    def reword(windows: list[list[int]], learnt: bool) -> Generator[Progress, None, list[list[int]]]:
        if learnt and lessons.data:
            return windows
        bounds = {"most": most, "seconds": seconds} if learnt else {}
        often = OFTEN if learnt else 1.0
        return (yield from reworded(original.decoder, gone, windows, often, lessons.seed, **bounds))

    return reword


def _teacher(original: Session, translation: Translation | None, lessons: Lessons) -> Teacher:
    if translation is None:
        return Teacher(original.decoder)
    return Translator(original.decoder, hard=TEXT if lessons.data else 0.0, translation=translation)


def _worked_in(
    student: Session, adapter: Adapter, dest: Path, held: str, against: Session | None
) -> Generator[Progress, None, tuple[float, Quality]]:
    """The student with the share of the adapter that is best, as `dest`; that share, and what came of it."""
    best: tuple[float, Quality] | None = None
    for share in SHARES:
        made = dest.with_name(f"{dest.name} by {share}")
        weights = Weights(student.parameters, student.config, [(adapter, share)])
        write_folder(made, student.hf_config, list(weights.specs(student.family.names)), side_files(student.checkpoint))
        with open_session(made, backend=student.backend) as healed:
            found = yield from quality(healed, held, f"After healing, {share:.0%} of it", against)
        worse = best is not None and found.loss >= best[1].loss
        shutil.rmtree(made if worse else dest, ignore_errors=True)
        if worse:
            break
        made.rename(dest)
        best = share, found
    return best
