"""What plans should lose, by what those that were carried out have lost.

Bits are shared out by a second-order estimate of what rounding costs. It adds up errors that in truth make one another
worse: it is too hopeful, and the more so the fewer bits there are (SmolLM2-135M loses 2.1 times the estimate at 76 MB,
2.2 times at 60 MB, 2.9 times at 50 MB). So it only says how plans compare, and measured plans say how much is lost:
rounding loses what it did in the plan whose estimate is nearest, times the ratio of the two estimates to the power of
1.3, the slope between those sizes. To that comes what the cuts lose, each measured alone; healing wins part of it back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf, log

from .plans import Plan, together
from .trial import Trial

POWER = 1.3  # of the estimate
NOISE = 0.02  # nats a token: differences that a short text does not show
HEALED = {"vocabulary": 0.7, "layers": 0.4, "channels": 0.4}  # of what a cut loses, about, comes back by healing
ROUNDED = 0.3  # of what rounding loses, about, comes back where scales are taught: of bits alone
OWN_WORDS = 0.4  # as much of that, where the original writes the text: it takes half of the time, and tells nothing new


@dataclass(frozen=True)
class Law:
    """points: (estimate, loss) of rounding, where both are known. Without any the estimate is believed."""

    points: Sequence[tuple[float, float]]

    def __call__(self, estimate: float) -> float:
        """Nats a token that rounding should lose."""
        if not self.points or estimate <= 0:
            return estimate
        known, lost = min(self.points, key=lambda point: abs(log(point[0] / estimate)))
        return lost * (estimate / known) ** POWER


@dataclass(frozen=True)
class Foretold:
    """A plan that was not carried out yet, and the loss to be expected."""

    plan: Plan
    loss: float


def foretold(trial: Trial) -> list[Foretold]:
    """Every plan within the size that was not carried out, healed ones as well, the least loss first."""
    measured = {o.plan: o.loss for o in trial.outcomes}
    fitting = [plan for plan in together(list(trial.losses)) if trial.shared(plan).nbytes <= trial.options.target_bytes]
    rounding = Law([(trial.shared(p).cost, loss) for p, loss in _rounded(trial, fitting)])
    found = []
    for plan in fitting:
        lost, loss = _lost(trial, plan), measured.get(plan.name)
        if loss is None:
            loss = lost + rounding(trial.shared(plan).cost)
        both = Foretold(plan, loss), Foretold(replace(plan, healed=True), loss - _won(trial, plan, loss - lost))
        found += [f for f in both if f.plan.name not in measured]
    return sorted(found, key=lambda f: f.loss)


def least(trial: Trial) -> float:
    """The least loss of a plan so far, as far as the text can tell."""
    return min((max(o.loss, NOISE) for o in trial.outcomes if o.loss is not None), default=inf)


def _rounded(trial: Trial, plans: Sequence[Plan]) -> Iterator[tuple[Plan, float]]:
    """What rounding alone has lost in plans that were carried out."""
    measured = {o.plan: o.loss for o in trial.outcomes if o.loss is not None}
    for plan in plans:
        if plan.name in measured and trial.shared(plan).cost > 0:
            yield plan, max(measured[plan.name] - _lost(trial, plan), NOISE)


def _lost(trial: Trial, plan: Plan) -> float:
    return sum(trial.losses[part] for part in plan.parts)


def _won(trial: Trial, plan: Plan, rounded: float) -> float:
    """What healing should bring back: of what was cut; of what rounding loses, `rounded`, where nothing was."""
    if not plan.parts:
        return ROUNDED * max(rounded, 0.0)
    won = sum(HEALED[part.kind] * max(trial.losses[part], 0.0) for part in plan.parts)
    return won * (1.0 if trial.options.calibration else OWN_WORDS)
