"""Where a mixture of experts sends a text: what each expert gets, how evenly, how decidedly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...backends.base import A, Step
from ...errors import BadOption, Unsupported
from ...models.config import MoEConfig
from ...runtime.session import Session

WINDOW = 512  # tokens that go through the model at once


@dataclass(frozen=True)
class Progress:
    done: int  # tokens
    total: int


@dataclass(frozen=True)
class LayerLoad:
    """One layer's experts. counts [E]: how often each was elected. entropy: of the shares that the experts get, 1 when
    all get the same. doubt: mean entropy of a token's softmax over the router's logits, 1 when it prefers none."""

    layer: int
    per_token: int
    counts: np.ndarray = field(repr=False)
    entropy: float
    doubt: float

    @property
    def load(self) -> np.ndarray:
        """[E]: what each expert gets, as multiples of an even share."""
        return self.counts * (len(self.counts) / max(self.counts.sum(), 1))

    @property
    def dead(self) -> tuple[int, ...]:
        """Experts that no token was sent to."""
        return tuple(np.flatnonzero(self.counts == 0).tolist())


@dataclass(frozen=True)
class Routed:
    tokens: int
    layers: tuple[LayerLoad, ...]


def routed(session: Session, text: str) -> Iterator[Progress | Routed]:
    """Ends with the Routed. Raises Unsupported for a model without experts, BadOption for a text without tokens."""
    layers = {
        i: layer.feed_forward
        for i, layer in enumerate(session.config.layers)
        if isinstance(layer.feed_forward, MoEConfig)
    }
    if not layers:
        raise Unsupported(
            f"{session.path} has no experts: every token takes the same way.", "Give a mixture of experts (MoE)."
        )
    ids = session.tokenizer.encode(text)
    if not ids:
        raise BadOption("The text has no tokens.", "Give some text behind --router.")
    heard = _Listener(session, {i: moe.experts for i, moe in layers.items()})
    size = min(WINDOW, session.config.context)
    for at in range(0, len(ids), size):
        yield Progress(at, len(ids))
        heard.run(ids[at : at + size])
    yield Progress(len(ids), len(ids))
    yield Routed(len(ids), tuple(heard.load(i, moe) for i, moe in layers.items()))


class _Listener:
    """Counts elections and entropies while windows of tokens go through the decoder."""

    def __init__(self, session: Session, experts: dict[int, int]):
        self.decoder, self.tokens = session.decoder, 0
        self.counts = {layer: np.zeros(count, np.int64) for layer, count in experts.items()}
        self.entropies = dict.fromkeys(experts, 0.0)

    def run(self, ids: Sequence[int]) -> None:
        ops, before = self.decoder.ops, self.decoder.listener
        self.decoder.listener = self._hear
        try:
            hidden = self.decoder.hidden(ops.array(np.array([ids], np.int32)), Step.whole(1, len(ids)))
            ops.numpy(hidden)
        finally:
            self.decoder.listener = before
        self.tokens += len(ids)

    def _hear(self, name: str, x: A) -> None:
        if name.endswith(".moe.logits"):
            scores = self.decoder.ops.numpy(x).astype(np.float64)
            self.entropies[_layer(name)] += float(entropy(softmax(scores)).sum())
        elif name.endswith(".moe.down.experts"):
            elected = self.decoder.ops.numpy(x).ravel()
            self.counts[_layer(name)] += np.bincount(elected, minlength=len(self.counts[_layer(name)]))

    def load(self, layer: int, moe: MoEConfig) -> LayerLoad:
        counts, most = self.counts[layer], np.log(max(moe.experts, 2))
        shares = counts / max(counts.sum(), 1)
        doubt = self.entropies[layer] / self.tokens / most
        return LayerLoad(layer, moe.per_token, counts, float(entropy(shares) / most), float(doubt))


def _layer(name: str) -> int:
    return int(name.split(".")[1])


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def entropy(shares: np.ndarray) -> np.ndarray:
    """Of distributions over the last axis, in nats; 0 log 0 is 0."""
    return -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(-1)
