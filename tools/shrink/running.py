"""The whole of it: bits alone first; then what single cuts lose; then the plans that promise most by that, while there
is time; a plan is healed if that may make it the best; the best becomes the new folder. When time is up, what is
under way is dropped; where nothing is made by then, what is not rounded yet becomes the nearest values, in seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ...checkpoint.write import require_new
from ...errors import BadFile, BadOption
from ..progress import Progress
from ..quantize.running import fingerprint
from ..work import Work
from .events import Estimate, Outcome, Result
from .foretelling import NOISE, Foretold, foretold, least
from .judging import Told
from .options import Options
from .plans import BITS_ALONE, cuts, together
from .report import write_report
from .trial import Trial, unreachable

VERSION = 4  # of the method: what an older one has left is not gone on with
WORSE = 1.15  # times the best loss: what is expected to lose more than that is not carried out
HEALING = 0.15  # of the time, at least, for healing: it is not begun with less
SURE = 0.7  # of the time that is left is learnt in: what is around it takes time as well
SAMPLING = 0.15  # of the time, at most, for the model's own text
FIRST = 0.9  # of the time, at most, until there is a model: then the rest is hurried
LAST = 0.98  # of the time: what is under way then is dropped, the report takes the rest


class TimeUp(Exception):
    """Goes through whatever is under way."""


def shrink(source: Path, dest: Path, options: Options, told: Told = lambda event: None) -> Iterator[Outcome | Result]:
    """Yields each plan's Outcome when it is known; ends with the Result. `told` hears the Progress on the way. `dest`
    appears complete, with REPORT.md, or not at all; what is found out is kept in a hidden folder beside it until then,
    and gone on with when the same is asked for again. Raises BadOption where no plan reaches the size."""
    require_new(dest)
    same = fingerprint(source, replace(options, minutes=1))  # more time may be given
    work = Work(dest, {"shrink": VERSION, **same}, "shrink")
    clock = Clock(work, 60 * options.minutes)

    def heard(event: Progress) -> None:
        clock.require(FIRST if not trial.outcomes else LAST)
        told(event)

    with Trial(source, work, options, heard, enough=lambda: clock.spent > SAMPLING * clock.limit) as trial:
        try:
            trial.prepare()
            yield from _tried(trial, clock)
        except (BadOption, BadFile):
            work.remove()
            raise
        except TimeUp:
            if not trial.made and (outcome := trial.hurried()):
                yield outcome
        if not trial.made:
            smallest = min(trial.shared(plan).nbytes for plan in together(list(trial.losses)))
            work.remove()
            raise unreachable(options.target_bytes, smallest)
        best = min(trial.made, key=lambda o: float("inf") if o.loss is None else o.loss)
        left = tuple(_left(trial))
        found = trial.original, tuple(trial.outcomes), tuple(trial.looked.values())
        result = Result(dest, best.plan, *found, left, clock.spent)
        write_report(trial.best, result, options)
        work.end(trial.best, dest)
    yield result


class Clock:
    """Seconds, those before a kill included."""

    def __init__(self, work: Work, limit: float):
        self.work, self.limit, self.started = work, limit, time.perf_counter()
        self.before = work.record("seconds") or 0.0

    @property
    def spent(self) -> float:
        return self.before + time.perf_counter() - self.started

    @property
    def left(self) -> float:
        return self.limit - self.spent

    def allows(self, seconds: float) -> bool:
        """Whether there are so many left."""
        self.work.keep_record("seconds", self.spent)
        return self.spent + seconds <= self.limit

    def require(self, share: float) -> None:
        """Raises TimeUp when that share of the limit is spent."""
        if self.spent > share * self.limit:
            raise TimeUp


def _tried(trial: Trial, clock: Clock) -> Iterator[Outcome]:
    """Bits alone, without feedback where even that would take too long; single cuts; then plan after plan."""
    if not trial.outcomes:
        yield trial.run(BITS_ALONE, method="gptq" if clock.allows(clock.spent) else "search")
    longest = trial.outcomes[0].seconds
    for plan in cuts(trial.subject.config, trial.options.target_bytes):
        looks = max((o.seconds for o in trial.looked.values()), default=longest)
        if plan not in trial.looked and clock.allows(looks + longest):
            yield trial.look(plan)
    while found := _next(trial, clock):
        rounding = max(o.seconds for o in trial.outcomes if "healed" not in o.plan)
        yield trial.run(found.plan, found.loss, minutes=SURE * (clock.left - rounding) / 60)


def _next(trial: Trial, clock: Clock) -> Foretold | None:
    """What promises most of all that there is time for. Before the first healing its plan is carried out without, if
    time allows: that takes little, and corrects what is foretold of all others."""
    takes = max(o.seconds for o in trial.outcomes if "healed" not in o.plan)
    for found in _promising(trial):
        needed = takes + HEALING * clock.limit * found.plan.healed
        if not clock.allows(needed):
            continue
        if found.plan.healed and len(trial.outcomes) == 1 and clock.allows(needed + takes):
            plain = replace(found.plan, healed=False)
            return next((f for f in foretold(trial) if f.plan == plain), found)
        return found
    return None


def _left(trial: Trial) -> Iterator[Estimate]:
    for found in _promising(trial):
        yield Estimate(found.plan.name, found.loss)
    for plan in cuts(trial.subject.config, trial.options.target_bytes):
        if plan not in trial.looked:
            yield Estimate(plan.name, None)


def _promising(trial: Trial) -> list[Foretold]:
    """Plans that were not carried out yet, the best first; none that should be much worse than the best so far, or that
    healing should not make better than that, as far as the text can tell."""
    if trial.weighed is None:
        return []
    best = least(trial)
    return [f for f in foretold(trial) if f.loss <= (best - NOISE if f.plan.healed else WORSE * best)]
