"""A pruned model taught by the original, so that what stays makes up for what went.

LoRA on every linear map, by the divergence from the original's predictions (Hinton et al. 2015; for pruned models
Muralidharan et al. 2024), worked into the weights at the end, whole or in part. Where tokens went, the embedding is
trained whole, the original speaks in the tokens that stay (see translation), and a text is learnt by its own next
tokens as well: what it loses in words it gains in what it talks about.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

from ...checkpoint import Spec
from ...registry import create_backend
from ...runtime.session import Session, open_session
from ...train import Finished, Settings
from ...train.artifacts import as_adapter
from ...train.methods import make_method
from ..fuse.weights import Weights
from ..progress import Progress
from ..teaching import Lessons, Reword, Taught, Teaching, teach
from ..translation import Translation
from ..work import Work
from .rewording import reworded
from .subject import Subject

RANK = 16
REWORDING = 0.2  # of the time, at most: passages are learnt from far slower than they are reworded
EMBEDDING = ("embed",)  # trained whole where its rows are fewer
OFTEN = 5.0  # times as likely as they are: words of tokens that went, in what is learnt from


def heal(
    subject: Subject, tokens: np.ndarray | None, pruned: Path, dest: Path, work: Work | None = None
) -> Generator[Progress, None, Taught]:
    """The model in `pruned`, healed, as the new folder `dest`. tokens: old ids of those that stayed, where not all did.
    work: where what is done is kept, and gone on with. Raises what `teach` raises."""
    lessons = subject.options.heal
    with ExitStack() as stack:
        ops = create_backend(subject.options.backend)
        student = stack.enter_context(open_session(pruned, backend=ops))
        original = stack.enter_context(open_session(subject.path, backend=ops))
        translation = None if tokens is None else Translation(original.tokenizer, student.tokenizer, tokens)
        method = {"rank": RANK, "modules_to_save": () if tokens is None else EMBEDDING}
        rewording = translation and _rewording(lessons, original, translation)
        learnt = partial(_learnt, student)
        teaching = Teaching(original, student, lessons, method, learnt, "healing", translation, rewording)
        return (yield from teach(teaching, dest, work))


def _learnt(student: Session, settings: Settings, finished: Finished, share: float) -> Iterable[Spec]:
    adapter = as_adapter(student, make_method(student, settings), finished.parameters, settings)
    return Weights(student.parameters, student.config, [(adapter, share)]).specs(student.family.names)


def _rewording(lessons: Lessons, original: Session, translation: Translation) -> Reword:
    """What judges shows words of tokens that went as often as they are expected, and what the original says and is
    learnt from, often; a text that was given is learnt as it stands, for its own sake too."""
    gone, seconds = list(translation.spelled), REWORDING * 60 * lessons.minutes
    most = lessons.steps and lessons.steps * lessons.batch_size

    def reword(windows: list[list[int]], learnt: bool) -> Generator[Progress, None, list[list[int]]]:
        if learnt and lessons.given:
            return windows
        bounds = {"most": most, "seconds": seconds} if learnt else {}
        often = OFTEN if learnt else 1.0
        return (yield from reworded(original.decoder, gone, windows, often, lessons.seed, **bounds))

    return reword
