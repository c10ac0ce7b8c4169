"""The whole of it: bits alone first; then what single cuts lose; then the plans that promise most by that, while there
is time; what was cut is healed if that may make it the best; the best becomes the new folder. When time is up, what is
under way is dropped; where nothing is made by then, what is not rounded yet becomes the nearest values, in seconds.

A plan should lose what its cuts lose, each alone, and what its bits do: the second-order estimate by which they are
shared out, times how much more than foretold bits alone have lost.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ...errors import BadFile, BadOption, OnDeviceError
from ..progress import Progress
from ..quantize.running import fingerprint
from ..quantize.work import Work
from .events import Estimate, Outcome, Result
from .judging import Told
from .options import Options
from .plans import BITS_ALONE, Plan, cuts, together
from .report import write_report
from .trial import Trial, unreachable

VERSION = 1  # of the method: what an older one has left is not gone on with
WORSE = 1.15  # times the best loss: what is expected to lose more than that is not carried out
NOISE = 0.02  # nats a token: differences that a short text does not show
HEALING = 0.3  # of the time, kept for healing where that promises something
HEALED = 0.5  # of what cuts lose, about, comes back by healing
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
    if dest.exists() or dest.is_symlink():
        raise OnDeviceError(f"{dest} exists already.", "Choose another name, or remove it first.")
    if not dest.absolute().parent.is_dir():
        raise OnDeviceError(f"There is no folder {dest.absolute().parent} to write to.", "Create it first.")
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
            least = min(trial.shared(plan).nbytes for plan in together(list(trial.losses)))
            work.remove()
            raise unreachable(options.target_bytes, least)
        best = min(trial.made, key=lambda o: float("inf") if o.loss is None else o.loss)
        left = tuple(_left(trial))
        found = trial.original, tuple(trial.outcomes), tuple(trial.looked.values())
        result = Result(dest, best.plan, *found, left, clock.spent)
        write_report(trial.best, result, options)
        trial.best.rename(dest)
    work.remove()
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
    """Bits alone, without feedback where even that would take too long; single cuts; the most promising plans; and the
    best of those that cut, healed."""
    if not trial.outcomes:
        yield trial.run(BITS_ALONE, method="gptq" if clock.allows(clock.spent) else "search")
    longest = max(o.seconds for o in trial.outcomes)
    for plan in cuts(trial.subject.config, trial.options.target_bytes):
        looks = max((o.seconds for o in trial.looked.values()), default=longest)
        if plan not in trial.looked and clock.allows(looks + longest):
            yield trial.look(plan)
    while candidates := _promising(trial):
        plan, expected = candidates[0]
        longest = max(o.seconds for o in trial.outcomes)
        if not clock.allows(longest + (HEALING * clock.limit if _worth_healing(trial) else 0)):
            break
        yield trial.run(plan, expected)
    plan = _worth_healing(trial)
    longest = max(o.seconds for o in trial.outcomes)
    if plan and clock.allows(longest + HEALING * clock.limit / 2):
        yield trial.run(replace(plan, healed=True), minutes=SURE * (clock.left - longest) / 60)


def _worth_healing(trial: Trial) -> Plan | None:
    """Of the plans carried out, the one that should lose least once healed, if that is less than the best so far."""
    lost = {o.plan: o.loss for o in trial.outcomes if o.loss is not None}
    hoped = {
        plan: lost[plan.name] - HEALED * sum(trial.losses[part] for part in plan.parts)
        for plan in together(list(trial.losses))
        if plan.parts and plan.name in lost and f"{plan.name}, healed" not in {o.plan for o in trial.outcomes}
    }
    plan = min(hoped, key=hoped.__getitem__, default=None)
    return plan if plan and hoped[plan] < min(lost.values()) else None


def _left(trial: Trial) -> Iterator[Estimate]:
    for plan, loss in _promising(trial):
        yield Estimate(plan.name, loss)
    for plan in cuts(trial.subject.config, trial.options.target_bytes):
        if plan not in trial.looked:
            yield Estimate(plan.name, None)


def _promising(trial: Trial) -> list[tuple[Plan, float]]:
    """Plans not carried out yet, with the loss that is expected, the least first; none that should be much worse than
    the best so far."""
    if trial.weighed is None:
        return []
    done = {o.plan for o in trial.outcomes}
    factor = max(trial.outcomes[0].loss or 0.0, 0.0) / trial.shared(BITS_ALONE).cost or 1.0
    most = WORSE * min((max(o.loss, NOISE) for o in trial.outcomes if o.loss is not None), default=float("inf"))
    found = []
    for plan in together(list(trial.losses)):
        shared = trial.shared(plan)
        loss = sum(trial.losses[part] for part in plan.parts) + factor * shared.cost
        if plan.name not in done and shared.nbytes <= trial.options.target_bytes and loss <= most:
            found.append((plan, loss))
    return sorted(found, key=lambda pair: pair[1])
