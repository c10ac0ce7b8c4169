"""The engine: ids in, ids out, as events. It owns the cache of one conversation and reuses what it already holds.

It knows nothing of text, tokenizers or files, and nothing prints from here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from .. import noise
from ..backends.base import A, Sampled, SamplingParams, Step
from ..errors import BadOption, ContextFull
from ..models.decoder import Decoder

PREFILL_CHUNK = 512  # tokens a forward pass at most: bounds the memory of a long prompt


@dataclass(frozen=True)
class GenerateOptions:
    """How an answer is made. max_tokens None: as many as the context holds. stop_ids end the answer (and belong to it).
    logit_bias: id -> what is added to its logit."""

    max_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    logit_bias: tuple[tuple[int, float], ...] = ()


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
        self._decode = self.ops.compile(self._logits, [self.cache, decoder.weights])

    def _logits(self, ids: A, step: Step) -> A:
        """ids [1, 1] -> logits [1, V]"""
        return self.decoder(ids, step).reshape(1, self.decoder.config.vocab)

    def reset(self) -> None:
        self.cache.reset(0)
        self.held = []

    def recompile(self) -> None:
        """After the adapters changed: what was recorded or computed with the old ones is dropped."""
        self.reset()
        self._decode = self.ops.compile(self._logits, [self.cache, self.decoder.weights])

    def generate(self, prompt: Sequence[int], options: GenerateOptions) -> Iterator[Prefilled | Token | Finished]:
        """Raises ContextFull when the prompt leaves no room for an answer, BadOption for ids out of range. The
        generator may be closed at any token: the cache stays true."""
        prompt = self._checked(prompt)
        logits, prefilled = self.prefill(prompt)
        yield prefilled
        room = self.capacity - len(prompt) + 1  # the last token needs no place: nothing follows it
        wanted = room if options.max_tokens is None else min(options.max_tokens, room)
        draw = _Draw(self.ops, options, prompt, self.decoder.config.vocab)
        started, count, reason = time.perf_counter(), 0, "length"
        pending = draw(logits, len(prompt)) if wanted else None
        try:
            while count < wanted:
                count += 1
                ahead = None
                if self.ops.asynchronous and count < wanted and not draw.needs_history:
                    ahead = draw(self._forward(pending.ids.reshape(1, 1), 1), len(prompt) + count)
                token = draw.read(pending)
                yield token
                if token.id in options.stop_ids:
                    reason = "stop"
                    break
                if count < wanted:
                    pending = ahead or draw(self._forward(self._ids([token.id]), 1), len(prompt) + count)
                    self.held.append(token.id)
        finally:
            self._forget(len(self.held))  # a step that ran ahead of a stop
        if reason == "length" and wanted == room and wanted != options.max_tokens:
            reason = "context"
        yield Finished(reason, count, time.perf_counter() - started)

    def prefill(self, prompt: Sequence[int]) -> tuple[A, Prefilled]:
        """Brings the cache to exactly these ids; returns the logits [1, V] behind the last one."""
        started = time.perf_counter()
        same = _common_prefix(self.held, prompt)
        self._forget(min(same, len(prompt) - 1))  # one token at least goes through the model, for its logits
        reused = len(self.held)
        for at in range(reused, len(prompt), PREFILL_CHUNK):
            chunk = list(prompt[at : at + PREFILL_CHUNK])
            logits = self._forward(self._ids(chunk), len(chunk), head=at + PREFILL_CHUNK >= len(prompt))
            self.held += chunk
        return logits, Prefilled(len(prompt) - reused, reused, time.perf_counter() - started)

    def _forward(self, ids: A, count: int, head: bool = True) -> A | None:
        """`count` more tokens through the model -> logits [1, V] behind the last, or None without the head."""
        slots, lengths = np.zeros(1, np.int32), np.full(1, count, np.int32)
        step = Step(self.cache.lengths[:1].copy(), lengths, slots, cache=self.cache)
        if count == 1:
            logits = self._decode(ids, step)
        elif head:
            logits = self.decoder(ids, step, np.array([count - 1], np.int32))
        else:
            logits = None
            x = self.decoder.hidden(ids, step)
            self.ops.numpy(
                self.ops.take(x.reshape(-1, self.decoder.config.width), slots)
            )  # wait: bounds what is queued
        self.cache.advance(slots, lengths)
        return logits

    def _ids(self, ids: Sequence[int]) -> A:
        return self.ops.array(np.array([ids], np.int32))

    def _forget(self, length: int) -> None:
        self.held = self.held[: self.cache.truncate(0, length)]

    def _checked(self, prompt: Sequence[int]) -> list[int]:
        prompt, vocab = [int(i) for i in prompt], self.decoder.config.vocab
        if not prompt:
            raise BadOption("The prompt is empty.", "Give at least one token of text.")
        if not all(0 <= i < vocab for i in prompt):
            raise BadOption(f"The prompt has token ids outside 0 … {vocab - 1}.", "Use the model's own tokenizer.")
        if len(prompt) > self.capacity:
            raise ContextFull(
                f"The prompt has {len(prompt)} tokens and the context holds {self.capacity}.",
                "Shorten the prompt, or give a larger --context (up to what the model was made for).",
            )
        return prompt


class _Draw:
    """Logits into a token: keeps the history that penalties need, and the noise's place."""

    def __init__(self, ops, options: GenerateOptions, prompt: Sequence[int], vocab: int):
        self.ops, self.options = ops, options
        s = options.sampling
        self.needs_history = (s.repetition, s.presence, s.frequency) != (1.0, 0.0, 0.0)
        self.counts = self.mask = None
        if self.needs_history:
            self.counts = np.bincount(prompt, minlength=vocab).astype(np.int32)[None], np.zeros((1, vocab), np.int32)
        if options.logit_bias:
            self.mask = np.zeros((1, vocab), np.float32)
            for token, bias in options.logit_bias:
                self.mask[0, token] = bias

    def __call__(self, logits: A, position: int) -> Sampled:
        u = noise.uniform(self.options.seed, "sample", position, (1,))
        return self.ops.sample(logits, [self.options.sampling], u, self.counts, self.mask)

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


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
