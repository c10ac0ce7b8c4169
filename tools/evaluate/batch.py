"""Many prompts at once: scored without a cache, or continued with one row each of a shared one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ... import noise
from ...backends.base import SamplingParams, Step
from ...models.decoder import Decoder
from .text import log_softmax, logits_of

BATCH_TOKENS = 2048  # of one forward pass, padding included
HEAD_ROWS = 128  # predictions whose logits are held at once
PREFILL_CHUNK = 512


@dataclass(frozen=True)
class Score:
    """The log-probability of a continuation, in nats, and whether every token of it was the likeliest."""

    logprob: float
    greedy: bool


def score(
    decoder: Decoder, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[int, Score]]:
    """(context, continuation), ids, neither empty -> (index, Score) in any order. What several pairs have in front of
    their last token (the answers "A" to "D" to one question) goes through the model once."""
    same: dict[tuple[int, ...], list[int]] = {}
    for i, (context, continuation) in enumerate(pairs):
        same.setdefault((*decoder.front, *context, *continuation[:-1]), []).append(i)
    for batch in _batches(list(same), batch_tokens):
        flat, width = _hidden(decoder, batch)
        rows, wanted = [], []
        for b, ids in enumerate(batch):
            for i in same[ids]:
                count = len(pairs[i][1])
                rows += range(b * width + len(ids) - count, b * width + len(ids))
                wanted += pairs[i][1]
        logprobs, likeliest = _targets(decoder, flat, np.array(rows, np.int32), np.array(wanted))
        at = 0
        for i in (i for ids in batch for i in same[ids]):
            end = at + len(pairs[i][1])
            yield i, Score(float(logprobs[at:end].sum(dtype=np.float64)), bool(likeliest[at:end].all()))
            at = end


def _batches(rows: list[tuple[int, ...]], most: int) -> Iterator[list[tuple[int, ...]]]:
    """Rows of like lengths together, the longest first, so that little is padding."""
    rows = sorted(rows, key=len, reverse=True)
    while rows:
        count = max(1, most // len(rows[0]))
        yield rows[:count]
        rows = rows[count:]


def _hidden(decoder: Decoder, batch: list[tuple[int, ...]]) -> tuple:
    """What the last block says, [B * T, D], and T."""
    lengths = np.array([len(ids) for ids in batch], np.int32)
    padded = np.zeros((len(batch), lengths.max()), np.int32)
    for row, ids in zip(padded, batch, strict=True):
        row[: len(ids)] = ids
    step = Step(np.zeros(len(batch), np.int32), lengths, np.arange(len(batch), dtype=np.int32))
    hidden = decoder.hidden(decoder.ops.array(padded), step)
    return hidden.reshape(-1, decoder.config.width), padded.shape[1]


def _targets(decoder: Decoder, flat, rows: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row: the log-probability of the wanted id, and whether it is the likeliest."""
    logprobs, likeliest = np.empty(len(rows), np.float32), np.empty(len(rows), bool)
    for at in range(0, len(rows), HEAD_ROWS):
        part = slice(at, at + HEAD_ROWS)
        found = log_softmax(logits_of(decoder, flat, rows[part]))
        logprobs[part] = found[np.arange(len(found)), wanted[part]]
        likeliest[part] = found.argmax(-1) == wanted[part]
    return logprobs, likeliest


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stop_ids: frozenset[int],
    sampling: SamplingParams | None = None,
    seed: int = 0,
    stopped: Callable[[int, int], bool] = lambda row, id: False,
) -> list[list[int]]:
    """Continue every prompt (none empty) by up to `max_tokens` ids. A row ends with a stop id, which is left out, or
    when `stopped(row, id)` says so of a token that was just added."""
    ops, count = decoder.ops, len(prompts)
    prompts = [[*decoder.front, *prompt] for prompt in prompts]
    cache = decoder.new_cache(count, max(map(len, prompts)) + max_tokens)
    answers: list[list[int]] = [[] for _ in prompts]
    alive = np.arange(count, dtype=np.int32)
    logits = np.stack([_prefill(decoder, cache, slot, prompt) for slot, prompt in enumerate(prompts)])
    for _ in range(max_tokens):
        u = np.array([noise.uniform(seed, f"row {b}", len(answers[b]), (1,))[0] for b in alive], np.float32)
        ids = ops.numpy(ops.sample(ops.array(logits), [sampling or SamplingParams()] * len(alive), u).ids)
        going = []
        for b, id in zip(alive.tolist(), ids.tolist(), strict=True):
            if id in stop_ids:
                continue
            answers[b].append(id)
            if not stopped(b, id) and len(answers[b]) < max_tokens:
                going.append(b)
        if not going:
            break
        alive = np.array(going, np.int32)
        logits = _forward(decoder, cache, alive, np.array([[answers[b][-1]] for b in going], np.int32))
    return answers


def _prefill(decoder: Decoder, cache, slot: int, prompt: Sequence[int]) -> np.ndarray:
    """logits [V] behind the prompt"""
    for at in range(0, len(prompt), PREFILL_CHUNK):
        ids = np.array([prompt[at : at + PREFILL_CHUNK]], np.int32)
        logits = _forward(decoder, cache, np.array([slot], np.int32), ids)
    return logits[0]


def _forward(decoder: Decoder, cache, slots: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """ids [B, T] for these slots -> logits [B, V] behind the last of each"""
    rows, tokens = ids.shape
    lengths = np.full(rows, tokens, np.int32)
    step = Step(cache.lengths[slots].astype(np.int32), lengths, slots, cache=cache)
    last = np.arange(rows, dtype=np.int32) * tokens + tokens - 1
    logits = decoder.ops.numpy(decoder(decoder.ops.array(ids), step, last))
    cache.advance(slots, lengths)
    return np.array(logits)
