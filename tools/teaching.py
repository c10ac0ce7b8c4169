"""A model that was made smaller, taught by what it was made from: the text, the time, what was gained.

Passages of a text (or what the original says itself) are learnt from by the divergence from the original's predictions;
the last of them are held out, and tell what came of it.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..checkpoint import Spec, write_folder
from ..errors import BadOption
from ..runtime.session import Session, open_session
from ..runtime.side_files import side_files
from ..train import Data, Event, Example, Finished, Settings, StepDone, Validating, load_data, train
from ..train.encode import encoded
from ..train.folder import read_record
from ..train.learner import Teacher
from .calibration import Sampling, samples
from .calibration.samples import read_text
from .evaluate.text import Evaluation, evaluate
from .progress import Progress
from .translation import Translation, Translator
from .work import Work

PROBED = 2  # steps by which the time of one is told: the first also prepares
VALIDATIONS = 4  # of a training, at most: late in it, the last state is nearly always the best
WRITING = 0.5  # of the time for learning, at most, that the original writes what is learnt from
PASSES = 3  # over the data at most, where the number of steps is not given
FEWEST = 8  # passages, of which one is held out
TEXT = 0.5  # of the loss, where tokens went: the text's own next tokens; the rest is the original's word
SHARES = (1.0, 0.7, 0.4)  # of what was learnt, as long as less is better

T = TypeVar("T")
Reword = Callable[[list[list[int]], bool], Generator[Progress, None, list[list[int]]]]
Learnt = Callable[[Settings, Finished, float], Iterable[Spec]]  # the student's tensors with a share of what it learnt


@dataclass(frozen=True)
class Lessons:
    """data: a text or .jsonl; None: what the original says, at most `sampled` tokens. own: data is what it has said
    before. steps: at most as many as `minutes` have room for. Of the data's passages of `length` tokens, `held_out`
    (but no more than `judged` tokens) are not learnt from: what was gained is measured on them."""

    data: Path | None = None
    steps: int | None = None
    minutes: float = 10.0
    length: int = 256
    batch_size: int = 2
    learning_rate: float = 5e-4
    sampled: int = 32768
    held_out: float = 0.1
    judged: int = 2048
    seed: int = 0
    own: bool = False

    def __post_init__(self):
        if not 0 < self.minutes < math.inf:
            raise BadOption(f"{self.minutes:g} minutes are no time to learn in.", "Give more than 0, such as 10.")
        if not 0 < self.learning_rate < math.inf:
            raise BadOption(f"A learning rate of {self.learning_rate:g} makes no sense.", "Give one such as 5e-4.")

    @property
    def given(self) -> bool:
        """There is a text that is learnt for its own sake."""
        return self.data is not None and not self.own

    @property
    def written(self) -> int:
        """Tokens that the original writes at most: as many as the steps will show, and what is held out of them."""
        shown = math.inf if self.steps is None else math.ceil(self.steps * self.batch_size / (1 - self.held_out))
        return min(self.sampled, max(FEWEST, shown) * self.length)


@dataclass(frozen=True)
class Quality:
    """On text that was held out. kl: from the original, where both know the same tokens."""

    perplexity: float
    bits_per_byte: float
    kl: float | None = None

    @property
    def loss(self) -> float:
        """What was learnt by, the divergence, where that is known."""
        return self.bits_per_byte if self.kl is None else self.kl


@dataclass(frozen=True)
class Taught:
    """steps that were made, and the one whose state was kept; share: of what was learnt, that was worked in. original,
    before, after: on the same text."""

    steps: int
    kept: int
    seconds: float
    original: Quality
    before: Quality
    after: Quality
    share: float = 1.0

    @property
    def better(self) -> bool:
        return self.after.loss <= self.before.loss


@dataclass(frozen=True)
class Teaching:
    """What is taught how: `student` by `original`, as the settings `method` say; `learnt`: what becomes of its
    tensors. name: of it all, for people. translation: where the student knows fewer tokens. reworded: see `passages`.
    rate: of learning, by how the student does before, instead of the lessons' own."""

    original: Session
    student: Session
    lessons: Lessons
    method: Mapping[str, Any]
    learnt: Learnt
    name: str
    translation: Translation | None = None
    reworded: Reword | None = None
    rate: Callable[[Quality], float] | None = None

    def settings(self, before: Quality) -> Settings:
        lessons = self.lessons
        return Settings(
            objective="distill", batch_size=lessons.batch_size, max_length=lessons.length, seed=lessons.seed,
            learning_rate=self.rate(before) if self.rate else lessons.learning_rate, schedule="cosine", warmup=0.1,
            **self.method,
        )  # fmt: skip

    @property
    def teacher(self) -> Teacher:
        if self.translation is None:
            return Teacher(self.original.decoder)
        hard = TEXT if self.lessons.given else 0.0
        return Translator(self.original.decoder, hard=hard, translation=self.translation)

    @property
    def against(self) -> Session | None:
        """What the student diverges from, token by token, if both know the same ones."""
        return None if self.translation else self.original


def teach(teaching: Teaching, dest: Path, work: Work | None = None) -> Generator[Progress, None, Taught]:
    """The student, taught, as the new folder `dest`: with all that was learnt, or a share of it (Wortsman et al. 2022):
    some of what a short training does is noise, whose harm grows with the square of its length, and its use with the
    length itself. work: where what is done is kept, and gone on with. Raises what `passages` raises, Unsupported for
    models and backends that cannot train."""
    started, t = time.perf_counter(), teaching
    data, held = yield from passages(t.lessons, t.original, t.student, t.reworded, work)
    first = yield from quality(t.original, held, "The original")
    before = yield from quality(t.student, held, f"Before {t.name}", t.against)
    settings, finished = yield from taught(t.student, data, t.settings(before), t.teacher, t.lessons, work)
    share, after = yield from _worked_in(teaching, partial(t.learnt, settings, finished), dest, held)
    return Taught(finished.step, finished.kept, time.perf_counter() - started, first, before, after, share)


def _worked_in(
    teaching: Teaching, learnt: Callable[[float], Iterable[Spec]], dest: Path, held: str
) -> Generator[Progress, None, tuple[float, Quality]]:
    """The best share of what was learnt, as `dest`, and what came of it."""
    student, best = teaching.student, None
    for share in SHARES:
        made = dest.with_name(f"{dest.name} by {share}")
        write_folder(made, student.hf_config, list(learnt(share)), side_files(student.checkpoint))
        with open_session(made, backend=student.backend) as session:
            found = yield from quality(session, held, f"After {teaching.name}, {share:.0%} of it", teaching.against)
        worse = best is not None and found.loss >= best[1].loss
        shutil.rmtree(made if worse else dest, ignore_errors=True)
        if worse:
            break
        made.rename(dest)
        best = share, found
    return best


# ------------------------------------------------------------------------------------------------ what is learnt from


def passages(
    lessons: Lessons, original: Session, student: Session, reworded: Reword | None = None, work: Work | None = None
) -> Generator[Progress, None, tuple[Data, str]]:
    """Examples for the student, and a text that none of them shows. reworded: done to both parts of a text, in the
    original's tokens, and told whether it is the part that is learnt from. work: where they are kept. Raises BadOption
    where there are too few, BadFile for what cannot be read."""
    if lessons.data is not None and lessons.data.suffix == ".jsonl":
        examples = load_data(lessons.data, student, lessons.length, validation=0).train
        learnt, held = _parted(_enough(examples, lessons), lessons)
    else:
        parts = (work and work.record("passages")) or (yield from _parts(lessons, original, reworded))
        if work:
            work.keep_record("passages", parts)
        learnt, held = (list(_examples(part, lessons, original, student)) for part in parts)
    text = "\n".join(student.tokenizer.decode(e.sequences[0].ids.tolist()) for e in held)
    return Data(learnt, held[: -(-len(held) // 2)]), text


def _parts(
    lessons: Lessons, original: Session, reworded: Reword | None
) -> Generator[Progress, None, list[list[list[int]]]]:
    """The passages that are learnt from, and those that are held out, in the original's tokens."""
    windows = yield from _windows(lessons, original)
    learnt, held = _parted(_enough([w for w in windows if len(w) > 1], lessons), lessons)
    if reworded:
        learnt, held = (yield from reworded(learnt, True)), (yield from reworded(held, False))
    return [learnt, held]


def _enough(passages: list[T], lessons: Lessons) -> list[T]:
    if len(passages) < FEWEST:
        raise BadOption(
            f"{lessons.data or 'The text'} holds {len(passages)} passages of {lessons.length} tokens to learn from.",
            f"Give a longer text: {FEWEST * lessons.length} tokens or more.",
        )
    return passages


def _examples(windows: Sequence[list[int]], lessons: Lessons, original: Session, student: Session) -> Iterator[Example]:
    for number, window in enumerate(windows, 1):
        ids = student.tokenizer.encode(original.tokenizer.decode(window, skip_special=False))[: lessons.length]
        if len(ids) > 1:
            yield Example((encoded(ids, [(0, len(ids))]),), f"passage {number}")


def _windows(lessons: Lessons, original: Session) -> Generator[Progress, None, list[list[int]]]:
    """A text in windows of the original's tokens; or what it writes itself."""
    if lessons.data is None:
        ends = time.perf_counter() + WRITING * 60 * lessons.minutes
        over = partial(_over, ends)
        for event in samples(original, None, lessons.written, lessons.length, lessons.seed, over):
            if isinstance(event, Sampling):
                yield Progress("The original writes what it teaches by", event.done, event.total, "tokens")
        return event.tolist()
    ids = original.tokenizer.encode(read_text(lessons.data))
    return [ids[at : at + lessons.length] for at in range(0, len(ids), lessons.length)]


def _over(ends: float) -> bool:
    return time.perf_counter() > ends


def _parted(passages: Sequence[T], lessons: Lessons) -> tuple[list[T], list[T]]:
    """What is learnt from, and the last ones, for measuring."""
    count = min(max(1, round(lessons.held_out * len(passages))), max(1, lessons.judged // lessons.length))
    return list(passages[:-count]), list(passages[-count:])


# ------------------------------------------------------------------------------------------------ the training


def taught(
    student: Session, data: Data, settings: Settings, teacher: Teacher, lessons: Lessons, work: Work | None = None
) -> Generator[Progress, None, tuple[Settings, Finished]]:
    """As many steps as were asked for, or as there is time and data for. work: where checkpoints and what was learnt
    are kept, and gone on with."""
    steps = (work and work.record("steps")) or (yield from _steps(student, data, settings, teacher, lessons))
    settings = replace(settings, steps=steps, validate_every=-(-steps // VALIDATIONS))
    if work is None:
        return settings, (yield from _told(train(student, data, settings, teacher=teacher), steps))
    work.keep_record("steps", steps)
    learning = work.path / "learning"
    learnt = work.arrays("learnt")
    if learnt is None or work.record("finished") is None:
        if (read_record(learning) or {}).get("ended"):
            shutil.rmtree(learning)  # ended in the moment before what it had learnt was kept
        run = train(student, data, settings, learning, resume=True, teacher=teacher)
        finished = yield from _told(run, steps)
        learnt = finished.parameters
        work.keep("learnt", learnt)
        work.keep_record("finished", finished.as_dict())
    return settings, Finished(**work.record("finished"), parameters=learnt)


def _steps(
    student: Session, data: Data, settings: Settings, teacher: Teacher, lessons: Lessons
) -> Generator[Progress, None, int]:
    """How many there is time for: two are tried, and thrown away."""
    most = lessons.steps or -(-PASSES * len(data.train) // settings.batch_size)
    seconds, last = 0.0, time.perf_counter()
    for event in train(student, replace(data, valid=[]), replace(settings, steps=PROBED), teacher=teacher):
        if isinstance(event, StepDone):
            yield Progress("Seeing how long a step takes", event.step, PROBED, "steps")
            seconds, last = time.perf_counter() - last, time.perf_counter()
    return max(1, min(most, int(60 * lessons.minutes / seconds)))


def _told(run: Iterator[Event], steps: int) -> Generator[Progress, None, Finished]:
    with closing(run):  # Ctrl-C where progress is shown makes a checkpoint as well
        for event in run:
            if isinstance(event, StepDone):
                yield Progress("Learning from the original", event.step, steps, f"steps, loss {event.loss:.3f}")
            elif isinstance(event, Validating):
                yield Progress("Looking at what was held out", event.done, event.total, "batches")
    return event


def quality(
    session: Session, text: str, stage: str, original: Session | None = None
) -> Generator[Progress, None, Quality]:
    """original: from which the divergence is measured."""
    for event in evaluate(session, text, min(512, session.config.context), None, original):
        if isinstance(event, Evaluation):
            return Quality(event.perplexity, event.bits_per_byte, event.kl)
        yield Progress(f"{stage}: measuring", event.done, event.total, "windows")
    raise AssertionError("an evaluation ends with what it found")
