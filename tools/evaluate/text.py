"""A model on a text: perplexity, and against a reference the divergence of its predictions.

The text is tokenized once, as the tokenizer does by default, and cut in windows side by side; each window is scored
from its second token on, and later windows get no BOS of their own. Against a reference, every prediction behind those
scores is compared: `kl` is the mean of KL(reference || model) in nats, `top1` the share with the same likeliest token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...backends.base import A, Step
from ...errors import BadOption
from ...models.decoder import Decoder
from ...runtime.session import Session

ROWS = 64  # predictions whose logits are held at once: bounds memory whatever the vocabulary


@dataclass(frozen=True)
class Progress:
    done: int  # windows
    total: int


@dataclass(frozen=True)
class Evaluation:
    """tokens: in the windows. scored: predictions that count. kl and top1 are None without a reference."""

    tokens: int
    scored: int
    perplexity: float
    reference_perplexity: float | None = None
    kl: float | None = None
    top1: float | None = None


def windows(ids: Sequence[int], context: int, tokens: int | None) -> list[list[int]]:
    """The first `tokens` ids, `context` at a time; a last one of a single token is left out: nothing to score."""
    if context < 2:
        raise BadOption(f"A context of {context} has nothing to score.", "Give --context 2 or more.")
    ids = list(ids[:tokens])
    cut = [ids[at : at + context] for at in range(0, len(ids), context)]
    return [window for window in cut if len(window) > 1]


def evaluate(
    session: Session, text: str, context: int = 512, tokens: int | None = None, against: Session | None = None
) -> Iterator[Progress | Evaluation]:
    """Ends with the Evaluation. `against` should have been opened with exact=True."""
    ids = session.tokenizer.encode(text)
    if against is not None:
        _same_tokens(session, against, ids, text)
    cut = windows(ids, _checked(context, session, against), tokens)
    if not cut:
        raise BadOption("The text has fewer than two tokens.", "Give a longer --text.")
    loss = reference_loss = kl = top1 = 0.0
    for done, window in enumerate(cut):
        yield Progress(done, len(cut))
        pairs = _predictions(session.decoder, window)
        references = _predictions(against.decoder, window) if against else iter(())
        for at, logprobs in pairs:
            places = np.arange(len(logprobs)), window[at + 1 : at + 1 + len(logprobs)]
            loss -= float(logprobs[places].sum(dtype=np.float64))
            if against:
                _, wanted = next(references)
                reference_loss -= float(wanted[places].sum(dtype=np.float64))
                kl += float((np.exp(wanted) * (wanted - logprobs)).sum(dtype=np.float64))
                top1 += float((wanted.argmax(-1) == logprobs.argmax(-1)).sum())
    scored = sum(len(window) - 1 for window in cut)
    result = Evaluation(sum(map(len, cut)), scored, math.exp(loss / scored))
    if against:
        result = Evaluation(
            result.tokens, scored, result.perplexity, math.exp(reference_loss / scored), kl / scored, top1 / scored
        )
    yield Progress(len(cut), len(cut))
    yield result


def _predictions(decoder: Decoder, window: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(first position, log-probabilities [rows, V] float32) for all positions but the last, a few rows at a time."""
    ops, p = decoder.ops, decoder.scope()
    hidden: A = decoder.hidden(ops.array(np.array([window], np.int32)), Step.whole(1, len(window)))
    flat = hidden.reshape(-1, decoder.config.width)
    for at in range(0, len(window) - 1, ROWS):
        rows = np.arange(at, min(at + ROWS, len(window) - 1), dtype=np.int32)
        yield at, log_softmax(ops.numpy(decoder.head(p, ops.take(flat, rows))))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """[N, V] float32 -> the same shape; the sum in float64."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)


def _checked(context: int, *sessions: Session | None) -> int:
    most = min(s.config.context for s in sessions if s)
    if context > most:
        raise BadOption(f"--context {context} is more than the model's {most} tokens.", f"Give {most} or less.")
    return context


def _same_tokens(session: Session, against: Session, ids: Sequence[int], text: str) -> None:
    if session.config.vocab != against.config.vocab or list(against.tokenizer.encode(text)) != list(ids):
        raise BadOption(
            f"{session.path} and {against.path} cut the text into different tokens: nothing to compare.",
            "Compare models with the same tokenizer.",
        )
