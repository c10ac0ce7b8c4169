"""How fast a model is here: load, prefill and decode, measured through the engine that chat uses."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .. import noise
from ..errors import BadOption
from .engine import Engine, Finished, GenerateOptions, Prefilled
from .memory import peak_memory_bytes


@dataclass(frozen=True)
class BenchOptions:
    """prompt_tokens: of the prefill. generate_tokens: of the decode, behind `depth` tokens of context."""

    prompt_tokens: int = 512
    generate_tokens: int = 64
    depth: int = 0
    repeat: int = 3


@dataclass(frozen=True)
class Run:
    """One repeat: seconds for the prompt, and decode speed."""

    prefill_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


@dataclass(frozen=True)
class Measured:
    """Medians over the runs."""

    runs: tuple[Run, ...]
    peak_memory_bytes: int

    def median(self, name: str) -> float:
        return statistics.median(getattr(run, name) for run in self.runs)

    def spread(self, name: str) -> tuple[float, float]:
        values = [getattr(run, name) for run in self.runs]
        return min(values), max(values)


def bench(engine: Engine, options: BenchOptions) -> Iterator[Run | Measured]:
    """A warm-up that is not counted, then a Run for each repeat, then Measured. Prompts are random ids, never repeated,
    so that nothing is found in the cache."""
    needed = max(options.prompt_tokens, max(options.depth, 1) + options.generate_tokens) + 1
    if needed > engine.capacity:
        raise BadOption(
            f"This bench needs a context of {needed} tokens and the model has {engine.capacity}.",
            "Ask for fewer tokens, or a larger --context.",
        )
    if min(options.prompt_tokens, options.generate_tokens, options.repeat) < 1:
        raise BadOption("Prompt tokens, generated tokens and repeats must be 1 or more.", "Give positive numbers.")
    _decode(engine, 0, 1, 4)
    runs = []
    for index in range(1, options.repeat + 1):
        prefill = _prefill(engine, index, options.prompt_tokens)
        decode = _decode(engine, index, options.depth, options.generate_tokens)
        runs.append(Run(prefill.seconds, prefill.tokens / prefill.seconds, options.generate_tokens / decode.seconds))
        yield runs[-1]
    yield Measured(tuple(runs), peak_memory_bytes())


def _prompt(engine: Engine, index: int, tokens: int) -> list[int]:
    vocab = engine.decoder.config.vocab
    return noise.generator(0, "bench", index).integers(0, vocab, tokens).astype(np.int32).tolist()


def _prefill(engine: Engine, index: int, tokens: int) -> Prefilled:
    engine.reset()
    events = engine.generate(_prompt(engine, index, tokens), GenerateOptions(max_tokens=1))
    return next(e for e in list(events) if isinstance(e, Prefilled))


def _decode(engine: Engine, index: int, depth: int, tokens: int) -> Finished:
    """`tokens` steps behind `depth` tokens (at least one: something must be asked)."""
    engine.reset()
    events = engine.generate(
        _prompt(engine, -index - 1 & sys.maxsize, max(depth, 1)), GenerateOptions(max_tokens=tokens + 1)
    )
    return next(e for e in list(events) if isinstance(e, Finished))
