"""The engine: ids in, ids out, as events. It owns the cache of one conversation and reuses what it already holds.

It knows nothing of text, tokenizers or files, and nothing prints from here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from .. import noise
from ..backends.base import A, Sampled, SamplingParams, Step
from ..errors import BadFile, BadOption, ContextFull
from ..models.decoder import Decoder

PREFILL_CHUNK = 512  # tokens a forward pass at most: bounds the memory of a long prompt
LUMP, MOST = 0.02, 8  # seconds, and tokens, that an answer may come in at a time: who reads does not see it


SENSIBLE = {  # a field of SamplingParams -> whether a value makes sense, and which do
    "temperature": (lambda v: 0 <= v < math.inf, "finite, 0 or more"),
    "top_k": (lambda v: v >= 0, "0 or more"),
    "top_p": (lambda v: 0 < v <= 1, "above 0, up to 1"),
    "min_p": (lambda v: 0 <= v <= 1, "from 0 to 1"),
    "repetition": (lambda v: 0 < v < math.inf, "finite, above 0"),
    "presence": (math.isfinite, "finite"),
    "frequency": (math.isfinite, "finite"),
    "top_logprobs": (lambda v: v >= 0, "0 or more"),
}


@dataclass(frozen=True)
class GenerateOptions:
    """How an answer is made. max_tokens None: as many as the context holds. stop_ids end the answer (and belong to it);
    None: the model's own, where there is a session that knows them. logit_bias: (id, what is added to its logit).
    Raises BadOption for values that make no sense."""

    max_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    stop_ids: frozenset[int] | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self):
        for name, (sensible, which) in SENSIBLE.items():
            value = getattr(self.sampling, name)
            if not sensible(value):
                raise BadOption(f"{name} = {value} makes no sense.", f"Give a number that is {which}.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise BadOption(f"max_tokens = {self.max_tokens} makes no sense.", "Give 1 or more.")
        if any(math.isnan(bias) or bias == math.inf for _, bias in self.logit_bias):
            raise BadOption("A logit bias is not a number.", "Give finite numbers, or -inf to forbid a token.")


@dataclass(frozen=True)
class Prefilled:
    """The prompt is in the cache: `tokens` went through the model, `reused` were there already."""

    tokens: int
    reused: int
    seconds: float


@dataclass(frozen=True)
class Token:
    """One more token. logprob and top (id, logprob; the likeliest first) only when asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Finished:
    """reason: stop (a stop id), length (max_tokens), context (no room left)."""

    reason: str
    tokens: int
    seconds: float  # from the first token to the last


class Engine:
    """One conversation on one decoder. `capacity` bounds prompt and answer together, in tokens."""

    def __init__(self, decoder: Decoder, capacity: int, kv_dtype: str | None = None):
        self.decoder, self.ops, self.capacity = decoder, decoder.ops, capacity
        self.cache = decoder.new_cache(1, capacity, kv_dtype)
        self.held: list[int] = []  # the ids whose keys and values the cache holds
        self._compile()

    def _compile(self) -> None:
        self._decode = self.ops.compile(self._logits, [self.cache, self.decoder.weights])

    def _logits(self, ids: A, step: Step) -> A:
        """ids [1, 1] -> logits [1, V]"""
        return self.decoder(ids, step).reshape(1, self.decoder.config.vocab)

    def reset(self) -> None:
        self.cache.reset(0)
        self.held = []

    def recompile(self) -> None:
        """After the adapters changed: what was recorded or computed with the old ones is dropped."""
        self.reset()
        self._compile()

    def generate(self, prompt: Sequence[int], options: GenerateOptions) -> Iterator[Prefilled | Token | Finished]:
        """Raises ContextFull when the prompt leaves no room for an answer, BadOption for ids out of range. The
        generator may be closed at any token, or interrupted anywhere: the cache stays true."""
        prompt = self._checked(prompt, options)
        whole = [*self.decoder.front, *prompt]
        logits, prefilled = self.prefill(whole)
        yield prefilled
        room = self.capacity - len(whole) + 1  # the last token needs no place: nothing follows it
        wanted = min(options.max_tokens or room, room)
        draw = _Draw(self.ops, options, prompt, self.decoder.config.vocab)
        reason = "length" if wanted == options.max_tokens else "context"
        started, count = 0.0, 0
        for token in self._answer(draw, logits, wanted):
            started, count = started or time.perf_counter(), count + 1
            yield token
            if token.id in (options.stop_ids or ()):
                reason = "stop"
                break
        yield Finished(reason, count, time.perf_counter() - started)

    def _answer(self, draw: _Draw, logits: A, wanted: int) -> Iterator[Token]:
        """`wanted` tokens behind these logits; where the backend can, as many at a time as come in LUMP. A state that
        knows no way back must not run ahead: who listens may stop."""
        count, several = 0, 1
        if "burst" in self.ops.features and draw.alone and not self.cache.recurrent:
            token, count = draw.read(draw(logits, 0)), 1
            yield token
            while count < wanted:
                began = time.perf_counter()
                ids = self._burst(token.id, draw, count, min(several, wanted - count))
                if ids is None:
                    logits = self._next(token.id, self._ids([token.id]))
                    break
                several = max(1, min(MOST, int(LUMP * len(ids) / (time.perf_counter() - began))))
                for token in map(Token, ids):
                    yield token
                count += len(ids)
            else:
                return
        yield from self._step_by_step(draw, logits, count, wanted)

    def _step_by_step(self, draw: _Draw, logits: A, count: int, wanted: int) -> Iterator[Token]:
        """The tokens from `count` on, whose logits these are."""
        pending = draw(logits, count)
        while True:
            ahead, count = None, count + 1
            if self.ops.asynchronous and count < wanted and not draw.needs_history:
                ahead = draw(self._forward(pending.ids.reshape(1, 1), 1), count)
            token = draw.read(pending)
            if ahead:
                self.held.append(token.id)  # it went through the model before anyone knew it
            yield token
            if count == wanted:
                return
            pending = ahead or draw(self._next(token.id, pending.ids.reshape(1, 1)), count)

    def _next(self, token: int, ids: A) -> A:
        """A token, `ids` on the device, through the model -> logits [1, V]"""
        logits = self._forward(ids, 1)
        self.held.append(token)
        return logits

    def _burst(self, token: int, draw: _Draw, count: int, several: int) -> list[int] | None:
        """The ids behind `token`, the count-th of an answer; None where it takes step by step."""
        slots, lengths = np.array([0], np.int32), np.array([1], np.int32)
        step = Step(self.cache.lengths[:1].copy(), lengths, slots, cache=self.cache)
        options = draw.options
        with self._moving(slots, lengths * several):
            u = draw.numbers(count, several)
            drawn = self._decode.burst(self._ids([token]), step, options.sampling, u, options.stop_ids or ())
            if drawn is None:
                return None
        ids = drawn.tolist()
        self.cache.advance(slots, lengths * len(ids))
        self.held += [token, *ids[:-1]]
        return ids

    def prefill(self, prompt: Sequence[int]) -> tuple[A, Prefilled]:
        """Brings the cache to exactly these ids, a soft prompt's places among them; returns the logits [1, V] behind
        the last one."""
        started = time.perf_counter()
        same = common_prefix(self.held, prompt)
        self._forget(min(same, len(prompt) - 1))  # one token at least goes through the model, for its logits
        reused = len(self.held)
        for at in range(reused, len(prompt), PREFILL_CHUNK):
            chunk = list(prompt[at : at + PREFILL_CHUNK])
            logits = self._forward(self._ids(chunk), len(chunk), head=at + PREFILL_CHUNK >= len(prompt))
            self.held += chunk
        require_numbers(self.ops.numpy(logits))  # which waits, so that the time is true
        return logits, Prefilled(len(prompt) - reused, reused, time.perf_counter() - started)

    def _forward(self, ids: A, count: int, head: bool = True) -> A | None:
        """`count` more tokens through the model -> logits [1, V] behind the last, or None without the head."""
        slots, lengths = np.array([0], np.int32), np.array([count], np.int32)
        step = Step(self.cache.lengths[:1].copy(), lengths, slots, cache=self.cache)
        with self._moving(slots, lengths):
            if count == 1:
                logits = self._decode(ids, step)
            elif head:
                logits = self.decoder(ids, step, np.array([count - 1], np.int32))
            else:
                logits, x = None, self.decoder.hidden(ids, step).reshape(-1, self.decoder.config.width)
                self.ops.numpy(self.ops.take(x, slots))  # wait: bounds what is queued
        self.cache.advance(slots, lengths)
        return logits

    @contextmanager
    def _moving(self, slots: np.ndarray, lengths: np.ndarray) -> Iterator[None]:
        """When interrupted, some layers have written to their places of the cache already, others have not."""
        try:
            yield
        except BaseException:
            self.cache.advance(slots, lengths)
            self._forget(len(self.held))
            self._compile()
            raise

    def _ids(self, ids: Sequence[int]) -> A:
        return self.ops.array(np.array([ids], np.int32))

    def _forget(self, length: int) -> None:
        self.held = self.held[: self.cache.truncate(0, length)]

    def _checked(self, prompt: Sequence[int], options: GenerateOptions) -> list[int]:
        prompt, vocab = [int(i) for i in prompt], self.decoder.config.vocab
        if not prompt:
            raise BadOption("The prompt is empty.", "Give at least one token of text.")
        require_known(prompt, vocab, "The prompt")
        if not all(0 <= i < vocab for i, _ in options.logit_bias):
            raise BadOption(f"A logit bias is for an id outside 0 … {vocab - 1}.", "Use the model's own tokenizer.")
        count = len(self.decoder.front) + len(prompt)
        if count > self.capacity:
            raise ContextFull(
                f"The prompt has {count} tokens and the context holds {self.capacity}.",
                "Shorten the prompt, or give a larger --context (up to what the model was made for).",
            )
        return prompt


class _Draw:
    """Logits into a token: keeps the history that penalties need, and the noise's place."""

    def __init__(self, ops, options: GenerateOptions, prompt: Sequence[int], vocab: int):
        self.ops, self.options = ops, options
        s, self.place = options.sampling, len(prompt)
        self.needs_history = (s.repetition, s.presence, s.frequency) != (1.0, 0.0, 0.0)
        self.counts = self.mask = None
        if self.needs_history:
            self.counts = np.bincount(prompt, minlength=vocab).astype(np.int32)[None], np.zeros((1, vocab), np.int32)
        if options.logit_bias:
            self.mask = np.zeros((1, vocab), np.float32)
            for token, bias in options.logit_bias:
                self.mask[0, token] = bias

        self.alone = not self.needs_history and self.mask is None and not s.top_logprobs  # logits are all it takes

    def __call__(self, logits: A, count: int) -> Sampled:
        """The answer's token behind `count` others."""
        return self.ops.sample(logits, [self.options.sampling], self.numbers(count, 1), self.counts, self.mask)

    def numbers(self, count: int, several: int) -> np.ndarray:
        """Where in [0, 1) to draw that token and the next ones, float32 [several]."""
        if self.options.sampling.temperature == 0:  # nothing is drawn, and the noise would take 1 % of a token
            return np.zeros(several, np.float32)
        places = range(self.place + count, self.place + count + several)
        return np.concatenate([noise.uniform(self.options.seed, "sample", place, (1,)) for place in places])

    def read(self, sampled: Sampled) -> Token:
        """Waits for the token."""
        token = int(self.ops.numpy(sampled.ids)[0])
        if self.needs_history:
            self.counts[1][0, token] += 1
        logprob = None if sampled.logprobs is None else float(self.ops.numpy(sampled.logprobs)[0])
        if sampled.top is None:
            return Token(token, logprob)
        ids, logprobs = (self.ops.numpy(a)[0] for a in sampled.top)
        return Token(token, logprob, tuple((int(i), float(p)) for i, p in zip(ids, logprobs, strict=True)))


def require_known(ids: Sequence[int], vocab: int, what: str = "The text") -> None:
    """Some tokenizers know more tokens than their model. Raises BadOption for ids that it has no embedding of."""
    if not all(0 <= i < vocab for i in ids):
        raise BadOption(f"{what} has token ids outside 0 … {vocab - 1}.", "Use the model's own tokenizer.")


def require_numbers(logits: np.ndarray) -> np.ndarray:
    """These, [..., V]. Raises BadFile where there is NaN among them: the likeliest token would be any."""
    if np.isnan(logits.max()):
        raise BadFile(
            "The model's predictions are NaN: its weights, or its adapter's, hold numbers that are NaN or infinite.",
            "Get the model again; training that diverged leaves such weights.",
        )
    return logits


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
