"""What a step minimises: a number for people, and the weight of each target's loss in the gradient.

Every objective here is a function of the sequences' log-probabilities. Its gradient is therefore that of a weighted
sum of token losses, whose weights are worked out on the host, in float64; a preference costs one more forward pass and
holds no more memory than two answers do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .batches import Batch
from .learner import Learner
from .settings import Settings


class Objective(ABC):
    """losses() are the batch's token losses under the model as it stands, computed when asked for."""

    preference = False

    @abstractmethod
    def share(self, batch: Batch) -> int:
        """How much a batch counts among those of a step."""

    @abstractmethod
    def weigh(self, batch: Batch, losses: Callable[[], np.ndarray], total: int) -> tuple[np.ndarray, float | None]:
        """The weight [M] of each target; and the batch's part of the step's loss, None where that is the weighted sum
        itself. total: the shares of all batches of the step."""

    def value(self, batch: Batch, losses: np.ndarray) -> float:
        """The batch's loss times its share, for validation."""
        weights, value = self.weigh(batch, lambda: losses, 1)
        return float(weights.astype(np.float64) @ losses) if value is None else value


class NextToken(Objective):
    """The mean over all targets of a step, however they fall into batches. Also distillation, where a target's loss is
    the divergence from the teacher."""

    def share(self, batch: Batch) -> int:
        return batch.learnt

    def weigh(self, batch: Batch, losses: Callable[[], np.ndarray], total: int) -> tuple[np.ndarray, float | None]:
        return np.full(batch.learnt, 1 / total), None


class Preference(Objective):
    """A function of two answers' log-probabilities. The first half of a batch's rows is chosen, the second rejected."""

    preference = True

    def share(self, batch: Batch) -> int:
        return len(batch.sources)

    def weigh(self, batch: Batch, losses: Callable[[], np.ndarray], total: int) -> tuple[np.ndarray, float | None]:
        owner = batch.owner.reshape(-1)[batch.places]
        counts = np.bincount(owner).astype(np.float64)
        values, slopes = self.pairs(batch, logprobs_of(batch, losses()), counts)
        return (-slopes[owner] / total), float(values.sum() / total)

    @abstractmethod
    def pairs(self, batch: Batch, logprobs: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """logprobs, counts [2 n]: of each sequence, and its number of targets -> the loss of each pair [n], and its
        derivative by each log-probability [2 n]."""


@dataclass
class Dpo(Preference):
    """Direct preference optimisation (Rafailov et al. 2023, equation 7): -log sigmoid of beta times how much more the
    model than the reference prefers what was chosen."""

    reference: Callable[[Batch], np.ndarray]  # token losses of the model as it was
    beta: float
    _known: dict[str, tuple[float, float]] = field(default_factory=dict)  # by source: chosen, rejected

    def pairs(self, batch: Batch, logprobs: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        gained = logprobs - self._before(batch)
        n = len(gained) // 2
        margin = self.beta * (gained[:n] - gained[n:])
        slope = -self.beta * _sigmoid(-margin)
        return _softplus(-margin), np.concatenate([slope, -slope])

    def _before(self, batch: Batch) -> np.ndarray:
        """The reference's log-probabilities: computed once a pair."""
        if any(source not in self._known for source in batch.sources):
            pairs = logprobs_of(batch, self.reference(batch)).reshape(2, -1).T
            self._known |= zip(batch.sources, map(tuple, pairs.tolist()), strict=True)
        return np.array([self._known[source] for source in batch.sources]).T.reshape(-1)


@dataclass
class Orpo(Preference):
    """Odds-ratio preference optimisation (Hong et al. 2024, equations 6 and 7): the chosen answer's mean loss, and beta
    times -log sigmoid of the log odds ratio of the two answers' mean probabilities."""

    beta: float

    def pairs(self, batch: Batch, logprobs: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n = len(logprobs) // 2
        mean = np.minimum(logprobs / counts, -1e-12)  # certainty has infinite odds
        odds = mean - np.log(-np.expm1(mean))
        margin = odds[:n] - odds[n:]
        slope = -self.beta * _sigmoid(-margin)
        by_mean = np.concatenate([slope, -slope]) / -np.expm1(mean)
        by_mean[:n] -= 1
        return -mean[:n] + self.beta * _softplus(-margin), by_mean / counts


def logprobs_of(batch: Batch, losses: np.ndarray) -> np.ndarray:
    """Token losses [M] -> the log-probability of each sequence, float64."""
    return -np.bincount(batch.owner.reshape(-1)[batch.places], losses)


def make_objective(settings: Settings, learner: Learner) -> Objective:
    """learner: whose losses, without anything trained, are DPO's reference."""
    if settings.objective == "dpo":
        reference = Learner(learner.method, learner.remat)
        return Dpo(lambda batch: reference.losses({}, batch), settings.beta)
    return Orpo(settings.beta) if settings.objective == "orpo" else NextToken()


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-_softplus(-x))


def _softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + exp(x))"""
    return np.logaddexp(0, x)
