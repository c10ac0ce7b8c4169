"""How fast a model is here: prefill and decode, measured through the engine that chat uses, and what work that was."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .. import noise
from ..backends.base import LayerCache
from ..errors import BadOption
from ..machine import peak_memory_bytes
from ..models.config import ModelConfig
from ..tensors import Tensor
from .engine import Engine, Finished, GenerateOptions, Prefilled
from .memory import idle_share


@dataclass(frozen=True)
class BenchOptions:
    """prompt_tokens: of each prefill to measure. generate_tokens: of each decode, behind each of `depths` tokens of
    context."""

    prompt_tokens: Sequence[int] = (512,)
    depths: Sequence[int] = (0,)
    generate_tokens: int = 64
    repeat: int = 3

    @property
    def context(self) -> int:
        """Tokens that the engine must have room for."""
        return max(*self.prompt_tokens, *(max(depth, 1) + self.generate_tokens for depth in self.depths)) + 1


@dataclass(frozen=True)
class Repeat:
    """One time through everything: tokens a second, by prompt length and by depth."""

    prefill: Mapping[int, float]
    decode: Mapping[int, float]


@dataclass(frozen=True)
class Measured:
    repeats: tuple[Repeat, ...]
    peak_memory_bytes: int

    def prefill(self, tokens: int) -> list[float]:
        return [repeat.prefill[tokens] for repeat in self.repeats]

    def decode(self, depth: int) -> list[float]:
        return [repeat.decode[depth] for repeat in self.repeats]


def bench(engine: Engine, options: BenchOptions) -> Iterator[Repeat | Measured]:
    """A warm-up that is not counted, then each Repeat, then Measured. Prompts are random ids, never repeated, so that
    nothing is found in the cache."""
    if options.context > engine.capacity:
        raise BadOption(
            f"This bench needs a context of {options.context} tokens and the model has {engine.capacity}.",
            "Ask for fewer tokens, or a larger --context.",
        )
    if min(*options.prompt_tokens, options.generate_tokens, options.repeat) < 1:
        raise BadOption("Prompt tokens, generated tokens and repeats must be 1 or more.", "Give positive numbers.")
    _decode(engine, 0, 1, 4)
    repeats = []
    for index in range(1, options.repeat + 1):
        prefill = {n: n / _prefill(engine, index, n).seconds for n in options.prompt_tokens}
        many = options.generate_tokens
        decode = {depth: many / _decode(engine, index, depth, many).seconds for depth in options.depths}
        repeats.append(Repeat(prefill, decode))
        yield repeats[-1]
    yield Measured(tuple(repeats), peak_memory_bytes())


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


# ------------------------------------------------------------------------------------------------ what work that is


@dataclass(frozen=True)
class Work:
    """Of one token: bytes of weights that must be read for it, operations (a product and a sum are two) on them; bytes
    and operations for each token of context behind it."""

    weight_bytes: float
    weight_operations: float
    context_bytes: float
    context_operations: float

    def bytes_at(self, depth: float) -> float:
        return self.weight_bytes + depth * self.context_bytes

    def operations_at(self, depth: float) -> float:
        return self.weight_operations + depth * self.context_operations


def work(config: ModelConfig, tensors: Mapping[str, Tensor], context_bytes: float) -> Work:
    """tensors: every parameter, in the format it is read in (blank ones will do). context_bytes: what the cache keeps
    of a token. A row of the embedding is next to nothing; a head that is the embedding is read whole. Of experts,
    those that a token goes to. Windows are left out of account."""
    nbytes = operations = 0.0
    for name, tensor in tensors.items():
        if name == "positions" or (name == "embed" and not config.tied):
            continue
        share = 1 - idle_share(config, name, tensor)
        nbytes += share * tensor.nbytes
        operations += share * 2 * float(np.prod(tensor.shape)) if len(tensor.shape) > 1 else 0.0
    attends = [spec for spec in config.caches if isinstance(spec, LayerCache)]
    heads = [layer.mixer.heads for layer in config.layers if isinstance(layer.mixer.cache, LayerCache)]
    attending = sum(2 * n * (spec.key_dim + spec.value_dim) for n, spec in zip(heads, attends, strict=True))
    return Work(nbytes, operations, context_bytes, attending)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and most."""
    return statistics.median(values), min(values), max(values)
