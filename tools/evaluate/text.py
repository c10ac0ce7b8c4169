"""Models on a text: perplexity and bits per byte, and against a reference the divergence of their predictions.

The text is tokenized once, as the tokenizer does by default, and cut in windows side by side; each window is scored
from its second token on, and later windows get no BOS of their own. Against a reference, every prediction behind those
scores is compared: `kl` is the mean of KL(reference || model) in nats, `top1` the share with the same likeliest token.
The reference's predictions are made once, a few rows at a time, and every model is held to them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from ...backends.base import A, Step
from ...errors import BadOption
from ...machine import cores
from ...models.decoder import Decoder
from ...runtime.engine import require_known, require_numbers
from ...runtime.session import Session

ROWS = 64  # predictions whose logits are held at once: bounds memory whatever the vocabulary
BLOCK = 8  # of them, looked at by one thread at a time: their numbers stay in its cache
LARGEST = math.log(sys.float_info.max)  # a mean loss beyond it, of a model that was cut to pieces, has no power
CONTEXT = 16  # tokens shown in front of one that went wrong


@dataclass(frozen=True)
class Progress:
    done: int  # windows
    total: int


@dataclass(frozen=True)
class Predictions:
    """What a model said at every scored place: losses [N] float32 (nats), likeliest [N] int32 (ids), divergences [N]
    float32 (KL from the reference, nats) or None."""

    losses: np.ndarray
    likeliest: np.ndarray
    divergences: np.ndarray | None = None

    @property
    def perplexity(self) -> float:
        loss = float(self.losses.mean(dtype=np.float64))
        return math.exp(loss) if loss < LARGEST or math.isnan(loss) else math.inf


@dataclass(frozen=True)
class Evaluation:
    """One model on a text. windows: the ids. bytes: of UTF-8 that the scored tokens stand for. kl, top1 and
    reference_perplexity are None without a reference."""

    windows: Sequence[Sequence[int]] = field(repr=False)
    bytes: int
    own: Predictions = field(repr=False)
    reference: Predictions | None = field(default=None, repr=False)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.windows))

    @property
    def scored(self) -> int:
        return len(self.own.losses)

    @property
    def perplexity(self) -> float:
        return self.own.perplexity

    @property
    def bits_per_byte(self) -> float:
        """The model as a compressor: comparable between tokenizers."""
        return float(self.own.losses.sum(dtype=np.float64)) / math.log(2) / max(self.bytes, 1)

    @property
    def reference_perplexity(self) -> float | None:
        return self.reference.perplexity if self.reference else None

    @property
    def kl(self) -> float | None:
        return float(self.own.divergences.mean(dtype=np.float64)) if self.reference else None

    @property
    def top1(self) -> float | None:
        return float((self.own.likeliest == self.reference.likeliest).mean()) if self.reference else None

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """(window, index in it) of every scored token."""
        return [(w, i) for w, window in enumerate(self.windows) for i in range(1, len(window))]

    def facts(self) -> dict[str, float | int]:
        """The numbers, by name."""
        names = ("tokens", "scored", "perplexity", "bits_per_byte", "reference_perplexity", "kl", "top1")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def worst(self, count: int) -> list[Miss]:
        """The `count` places where the model is farthest from the reference, or from the text without one."""
        measure = self.own.losses if self.own.divergences is None else self.own.divergences
        order = np.argsort(-measure, kind="stable")[:count]
        return [self._miss(int(at)) for at in order]

    def _miss(self, at: int) -> Miss:
        w, i = self.places[at]
        window = self.windows[w]
        return Miss(
            position=sum(map(len, self.windows[:w])) + i,
            before=tuple(window[max(0, i - CONTEXT) : i]),
            token=window[i],
            loss=float(self.own.losses[at]),
            likeliest=int(self.own.likeliest[at]),
            kl=None if self.own.divergences is None else float(self.own.divergences[at]),
            wanted=None if self.reference is None else int(self.reference.likeliest[at]),
        )


@dataclass(frozen=True)
class Miss:
    """A place where a model did badly. position: of the token, in the text's tokens. before: ids in front of it.
    likeliest: what the model held likeliest; wanted: what the reference did."""

    position: int
    before: tuple[int, ...]
    token: int
    loss: float
    likeliest: int
    kl: float | None = None
    wanted: int | None = None


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
    for event in evaluate_together([session], text, context, tokens, against):
        yield event[0] if isinstance(event, list) else event


def evaluate_together(
    sessions: Sequence[Session],
    text: str,
    context: int = 512,
    tokens: int | None = None,
    against: Session | None = None,
) -> Iterator[Progress | list[Evaluation]]:
    """Several models that cut the text alike, on the same windows; ends with their Evaluations, in order.

    Raises BadOption where they don't, for a context that one of them lacks, and for a text of fewer than two tokens.
    """
    tokenizer, everyone = sessions[0].tokenizer, [*sessions, *([against] if against else [])]
    ids = tokenizer.encode(text)
    require_known(ids, sessions[0].config.vocab)
    for other in everyone[1:]:
        _same_tokens(sessions[0], other, ids, text)
    cut = windows(ids, _checked(context, everyone), tokens)
    if not cut:
        raise BadOption("The text has fewer than two tokens.", "Give a longer --text.")
    scored: list[list[tuple]] = [[] for _ in everyone]
    with ThreadPoolExecutor(cores()) as pool:
        for done, window in enumerate(cut):
            yield Progress(done, len(cut))
            for found in _score(sessions, against, window, pool):
                for parts, part in zip(scored, found, strict=True):
                    parts.append(part)
    made = [_joined(parts) for parts in scored]
    reference = made.pop() if against else None
    count = sum(len(tokenizer.bytes_of(id)) for window in cut for id in window[1:])
    yield Progress(len(cut), len(cut))
    yield [Evaluation(cut, count, own, reference) for own in made]


# ------------------------------------------------------------------------------------------------ one window


def _score(
    sessions: Sequence[Session], against: Session | None, window: Sequence[int], pool: ThreadPoolExecutor
) -> Iterator[list[tuple]]:
    """For a few rows at a time: (losses, likeliest, divergences) of every model, the reference's last."""
    held = [_hidden(session, window) for session in sessions]
    reference = _hidden(against, window) if against else None
    for at in range(0, len(window) - 1, ROWS):
        rows = np.arange(at, min(at + ROWS, len(window) - 1), dtype=np.int32)
        targets = np.array(window[at + 1 : at + 1 + len(rows)])
        blocks = np.array_split(np.arange(len(rows)), -(-len(rows) // BLOCK))
        wanted = None
        if against:
            logits = logits_of(against.decoder, reference, rows)
            wanted = list(pool.map(lambda block, logits=logits: log_softmax(logits[block]), blocks))
        found = []
        for session, states in zip(sessions, held, strict=True):
            logits = logits_of(session.decoder, states, rows)
            work = [(logits[b], targets[b], wanted[i] if wanted else None) for i, b in enumerate(blocks)]
            found.append(_together(pool.map(lambda job: _compare(*job), work)))
        if wanted:
            own = (_measured(logprobs, targets[b]) for logprobs, b in zip(wanted, blocks, strict=True))
            found.append(_together(own))
        yield found


def _hidden(session: Session, window: Sequence[int]) -> A:
    """Through a cache where the session was opened with one of a certain type: what that costs is to be seen."""
    decoder = session.decoder
    ids, front = [*decoder.front, *window], len(decoder.front)
    step = Step.whole(1, len(ids))
    if session.kv_dtype:
        step = replace(step, cache=decoder.new_cache(1, len(ids), session.kv_dtype))
    states = decoder.hidden(decoder.ops.array(np.array([ids], np.int32)), step)
    states = states.reshape(-1, decoder.config.width)
    return decoder.ops.take(states, np.arange(front, len(ids), dtype=np.int32)) if front else states


def hidden(decoder: Decoder, ids: Sequence[int]) -> A:
    """ids [T], a text from its beginning -> what the last block says, [T, D]"""
    states = decoder.hidden(decoder.ops.array(np.array([ids], np.int32)), Step.whole(1, len(ids)))
    return states.reshape(-1, decoder.config.width)


def logits_of(decoder: Decoder, states: A, rows: np.ndarray) -> np.ndarray:
    """What the head makes of some of these rows [N, D], on the host: [len(rows), V]. Raises BadFile where that is no
    prediction, so that none is told as a measurement."""
    return require_numbers(decoder.ops.numpy(decoder.head(decoder.scope(), decoder.ops.take(states, rows))))


def _compare(logits: np.ndarray, targets: np.ndarray, wanted: np.ndarray | None) -> tuple:
    if wanted is None:
        return _measured(logits, targets)
    logprobs = log_softmax(logits)
    apart = np.subtract(wanted, logprobs)
    apart *= np.exp(wanted)
    losses, likeliest, _ = _measured(logits, targets)
    return losses, likeliest, apart.sum(-1, dtype=np.float64).astype(np.float32)


def _measured(logits: np.ndarray, targets: np.ndarray) -> tuple:
    """Losses and likeliest ids; log-probabilities will do, too."""
    rows, likeliest = np.arange(len(targets)), logits.argmax(-1)
    shifted = logits - logits[rows, likeliest][:, None]
    losses = -shifted[rows, targets]
    np.exp(shifted, out=shifted)
    losses += np.log(shifted.sum(-1, dtype=np.float64)).astype(np.float32)
    return losses, likeliest.astype(np.int32), None


def _together(parts) -> tuple:
    return tuple(None if column[0] is None else np.concatenate(column) for column in zip(*parts, strict=True))


def _joined(parts: Sequence[tuple]) -> Predictions:
    return Predictions(*_together(parts))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """[N, V] float32 -> the same shape; the sum in float64."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)


def _checked(context: int, sessions: Sequence[Session]) -> int:
    most = min(s.config.context for s in sessions)
    if context > most:
        raise BadOption(
            f"A window of {context} tokens is more than the model's {most} tokens.", f"Give {most} or less."
        )
    return context


def _same_tokens(one: Session, other: Session, ids: Sequence[int], text: str) -> None:
    if one.config.vocab != other.config.vocab or list(other.tokenizer.encode(text)) != list(ids):
        raise BadOption(
            f"{one.path} and {other.path} cut the text into different tokens: nothing to compare.",
            "Compare models with the same tokenizer.",
        )
