"""Experts that a mixture can do without: those that add least, by the router's gate times the length of what they say,
over the tokens of the calibration set (REAP, Lasby et al. 2025)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace

import numpy as np

from ...errors import BadOption
from ...models.config import MoEConfig
from ..calibration import Stage, stream
from ..progress import Progress
from .cutting import Cut
from .events import Score, Scores
from .options import Amount
from .subject import Subject

Choice = Generator[Progress, None, tuple[Cut, Scores]]


def choose(subject: Subject, cut: Cut) -> Choice:
    """Raises BadOption for models without experts, when fewer would stay than a token is sent to, and for a count that
    the groups in which experts stand cannot give up alike."""
    mixtures = {i: f for i, layer in enumerate(cut.config.layers) if isinstance(f := layer.feed_forward, MoEConfig)}
    if not mixtures:
        raise BadOption("This model has no experts.", "Leave --experts out.")
    count = _count(subject.options.experts, [*mixtures.values()])
    for f in mixtures.values():
        if f.experts - count < f.per_token:
            raise BadOption(
                f"--experts {count} would leave {f.experts - count} of {f.experts}, but a token is sent to"
                f" {f.per_token}.",
                f"Give {f.experts - f.per_token} or less.",
            )
    windows = yield from subject.windows(cut.tokens)
    kept, rows = {}, []
    for stage in stream(subject.config, subject.parameters, subject.ops, windows):
        i = int(stage.prefix.rpartition(".")[2]) if "." in stage.prefix else -1
        if i >= 0 and i not in cut.layers:
            stage.skip()
        if i not in mixtures or i not in cut.layers:
            continue
        yield Progress("Choosing experts", i, len(cut.config.layers), "layers")
        scores = Listener(stage, subject.numbers(f"{stage.prefix}.moe.down")).scores(mixtures[i].experts)
        groups = mixtures[i].rule.groups
        order = np.argsort(scores.reshape(groups, -1), axis=1, kind="stable")[:, count // groups :]
        kept[i] = np.sort((order + np.arange(groups)[:, None] * (len(scores) // groups)).ravel())
        rows += [Score(f"layer {i}, expert {e}", float(score), int(e in kept[i])) for e, score in enumerate(scores)]
    return replace(cut, experts=kept), Scores("experts", "gate times length", tuple(rows))


def _count(wanted: Amount, mixtures: Sequence[MoEConfig]) -> int:
    """Of each layer's experts, as many of each group. A share is rounded to that, a count must be it."""
    groups = max(f.rule.groups for f in mixtures)
    count = wanted.of(min(f.experts for f in mixtures))
    if count % groups and wanted.share is None:
        raise BadOption(
            f"--experts {count} cannot be taken alike from the {groups} groups in which this model's experts stand.",
            f"Give a multiple of {groups}, or a share.",
        )
    return max(groups, count // groups * groups)


class Listener:
    """Sums up what each expert adds while a layer runs. down: float32 [E, D, F]."""

    def __init__(self, stage: Stage, down: np.ndarray):
        self.prefix, self.down = f"{stage.prefix}.moe", down
        self.sums = np.zeros(len(down))
        self.asked = 0
        self.gates: np.ndarray | None = None
        self.ids: np.ndarray | None = None
        stage.observe(self)

    def __call__(self, name: str, x: np.ndarray) -> None:
        if name == f"{self.prefix}.logits":
            shifted = np.exp(x - x.max(-1, keepdims=True))
            self.gates = shifted / shifted.sum(-1, keepdims=True)  # [N, E]
        elif name == f"{self.prefix}.down.experts":
            self.ids = np.array(x)  # [N, k]
        elif name == f"{self.prefix}.down.input":
            for e in np.unique(self.ids):
                chosen = self.ids == e
                said = np.linalg.norm(x.reshape(*self.ids.shape, -1)[chosen] @ self.down[e].T, axis=-1)
                self.sums[e] += float((said * self.gates[chosen.any(-1), e]).sum())
            self.asked += self.ids.size

    def scores(self, experts: int) -> np.ndarray:
        """The mean over all tokens: an expert that is seldom asked adds little."""
        return self.sums[:experts] / max(self.asked, 1)
