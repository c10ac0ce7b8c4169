"""How far one model's predictions are from another's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...models.decoder import Decoder
from ..evaluate.text import hidden, log_softmax, logits_of

ROWS = 64  # predictions whose logits are held at once


@dataclass(frozen=True)
class Drift:
    """KL(reference || model) in nats a prediction: its mean and its greatest; top1: the share of predictions with the
    same likeliest token."""

    mean: float
    most: float
    top1: float


def drift(reference: Decoder, model: Decoder, ids: np.ndarray) -> Drift:
    """ids [N, T]: every prediction in every window counts."""
    found = [_of_window(reference, model, window) for window in ids]
    kl, same = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Drift(float(kl.mean()), float(kl.max()), float(same.mean()))


def _of_window(reference: Decoder, model: Decoder, window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    states = [hidden(decoder, window) for decoder in (reference, model)]
    kl, same = [], []
    for at in range(0, len(window), ROWS):
        rows = np.arange(at, min(at + ROWS, len(window)), dtype=np.int32)
        wanted, got = (
            log_softmax(logits_of(decoder, state, rows))
            for decoder, state in zip((reference, model), states, strict=True)
        )
        kl.append(np.maximum((np.exp(wanted) * (wanted - got)).sum(-1, dtype=np.float64), 0))
        same.append(wanted.argmax(-1) == got.argmax(-1))
    return np.concatenate(kl), np.concatenate(same)
