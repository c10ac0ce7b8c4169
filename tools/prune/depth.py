"""Which whole layers a model can best do without.

How little a layer does is told by how little it turns the stream (ShortGPT, Men et al. 2024: one minus the cosine of
what comes in and what goes out). That is where the search begins; what it goes by is how far the model's predictions
move, the mean KL divergence from those of the whole, once a layer and all those dropped before it are gone.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...backends.base import A, Step
from ...errors import BadOption
from ...models.decoder import Decoder
from ..evaluate.text import log_softmax, logits_of
from ..progress import Progress
from .cutting import Cut
from .events import Score, Scores
from .subject import Subject

TRIED = 8  # layers a round, those that turn the stream least
TOKENS = 512  # run for each layer tried
PLACES = 256  # predictions that are compared
LENGTH = 128  # tokens a window: a layer's worth shows in short ones, and many of them vary more

Choice = Generator[Progress, None, tuple[Cut, Scores]]


def choose(subject: Subject, cut: Cut) -> Choice:
    """Raises BadOption for layers that there are not, or when none would stay."""
    total, o = len(subject.config.layers), subject.options
    if o.drop_layers:
        _check_dropped(o.drop_layers, total)
        return replace(cut, layers=tuple(i for i in cut.layers if i not in o.drop_layers)), Scores("layers", "", ())
    count = o.layers.of(total)
    if count >= total:
        raise BadOption(f"--layers {count}: this model has {total} layers; one must stay.", "Give a smaller number.")
    dropped, influences = yield from dispensable(subject, count, cut.tokens)
    rows = tuple(Score(str(i), influences[i], int(i not in dropped)) for i in range(total))
    return replace(cut, layers=tuple(i for i in cut.layers if i not in dropped)), Scores("layers", "influence", rows)


def dispensable(
    subject: Subject, count: int, tokens: np.ndarray | None = None
) -> Generator[Progress, None, tuple[list[int], dict[int, float]]]:
    """Layers to drop, in this order, and how much each layer of the model turns the stream. tokens: those that stay."""
    windows = yield from subject.windows(tokens)
    passes, total = Passes(subject.session.decoder, _short(windows)), len(subject.config.layers)
    influences = yield from _influences(passes, total)
    dropped: list[int] = []
    for round_ in range(count):
        candidates = sorted((i for i in range(total) if i not in dropped), key=influences.__getitem__)[:TRIED]
        found = yield from _divergences(passes, dropped, candidates, f"Trying layers, {round_ + 1} of {count}")
        dropped.append(min(found, key=found.__getitem__))
    return dropped, influences


def _check_dropped(layers: Sequence[int], total: int) -> None:
    unknown = [i for i in layers if i >= total]
    if unknown:
        raise BadOption(f"There is no layer {unknown[0]}: this model has 0 to {total - 1}.", "Correct --drop-layers.")
    if len(layers) >= total:
        raise BadOption("--drop-layers names every layer, and one must stay.", "Name fewer.")


def _short(windows: np.ndarray) -> np.ndarray:
    length = min(LENGTH, windows.shape[1])
    return np.ascontiguousarray(windows[:, : windows.shape[1] // length * length].reshape(-1, length))


@dataclass
class Passes:
    """Windows run through a model that lacks some of its layers."""

    decoder: Decoder
    windows: np.ndarray

    def __post_init__(self):
        used = max(1, -(-TOKENS // self.windows.shape[1]))
        chosen = np.linspace(0, len(self.windows) - 1, min(used, len(self.windows))).round().astype(int)
        self.windows = self.windows[chosen]
        self.step = Step.whole(*self.windows.shape)
        places = self.windows.size
        self.places = np.linspace(0, places - 1, min(PLACES, places)).round().astype(np.int32)
        self.start = self.decoder.embed(self.decoder.scope(), self.decoder.ops.array(self.windows))

    def through(self, x: A, layers: Sequence[int]) -> A:
        for i in layers:
            x = self.decoder.block(self.decoder.scope(), i, x, self.step)
        return x

    def predictions(self, x: A) -> np.ndarray:
        """Log probabilities [places, V]."""
        return log_softmax(logits_of(self.decoder, x.reshape(-1, self.decoder.config.width), self.places))


def _influences(passes: Passes, total: int) -> Generator[Progress, None, dict[int, float]]:
    influences, x = {}, passes.start
    for i in range(total):
        yield Progress("What each layer does", i, total, "layers")
        before = np.array(passes.decoder.ops.numpy(x)).reshape(-1, passes.decoder.config.width)
        x = passes.through(x, [i])
        after = np.array(passes.decoder.ops.numpy(x)).reshape(before.shape)
        lengths = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
        influences[i] = float(np.mean(1 - (before * after).sum(-1) / np.maximum(lengths, 1e-30)))
    passes.whole = passes.predictions(x)
    return influences


def _divergences(
    passes: Passes, dropped: Sequence[int], candidates: Sequence[int], stage: str
) -> Generator[Progress, None, dict[int, float]]:
    """Candidate -> KL from the whole model's predictions without it and the dropped. What comes before a candidate is
    computed once for all."""
    total = len(passes.decoder.config.layers)
    found, x, done = {}, passes.start, 0
    for number, i in enumerate(sorted(candidates)):
        yield Progress(stage, number, len(candidates), "layers")
        x, done = passes.through(x, [j for j in range(done, i) if j not in dropped]), i
        logprobs = passes.predictions(passes.through(x, [j for j in range(i + 1, total) if j not in dropped]))
        found[i] = float((np.exp(passes.whole) * (passes.whole - logprobs)).sum(-1).mean())
    return found
