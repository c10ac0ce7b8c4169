"""A model opened for use: files -> decoder on a backend, with its tokenizer, template and the settings it came with."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from .. import hub
from ..backends.base import Backend, SamplingParams
from ..checkpoint import Checkpoint, open_checkpoint
from ..errors import BadFile, BadOption, OnDeviceError
from ..models.config import ModelConfig
from ..models.decoder import Decoder
from ..models.families import Family, family_of
from ..models.parameters import Parameters
from ..registry import create_backend
from ..tensors import Tensor
from . import memory
from .engine import Engine, GenerateOptions
from .side_files import tokenizer_of
from .text import Piece, TextFinished, stream_text
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from ..adapters import Adapter
    from .template import ChatTemplate

DEFAULT_CONTEXT = 8192  # tokens, where the model could hold more: a cache's memory is set aside for the whole of it


@dataclass(frozen=True)
class Loading:
    """Reported while a model loads: bytes done, of all."""

    done: int
    total: int


@dataclass(frozen=True)
class Attached:
    """An adapter that is in use: where it came from, and how much of it counts (1: as it was trained)."""

    path: Path
    weight: float
    adapter: Adapter

    def __str__(self) -> str:
        return str(self.path) if self.weight == 1 else f"{self.path}:{self.weight:g}"


@dataclass
class Session:
    """Everything about one opened model. `engine` is made when first used."""

    path: Path
    family: Family
    hf_config: Mapping
    config: ModelConfig
    decoder: Decoder
    checkpoint: Checkpoint
    parameters: Parameters
    capacity: int
    load_seconds: float = 0.0
    kv_dtype: str | None = None
    attached: tuple[Attached, ...] = ()

    def __post_init__(self):
        self.weights = self.decoder.weights  # the model's own, whatever adapters put in their place

    @property
    def backend(self) -> Backend:
        return self.decoder.ops

    @cached_property
    def engine(self) -> Engine:
        return Engine(self.decoder, self.capacity, self.kv_dtype)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return tokenizer_of(self.checkpoint)

    @cached_property
    def template(self) -> ChatTemplate:
        from .template import ChatTemplate  # the template language is loaded for those who use it

        return ChatTemplate.of(self.tokenizer)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer: the tokenizer's, and those that generation_config.json names."""
        named = self.generation_config.get("eos_token_id")
        named = [named] if isinstance(named, int) else named or []
        if not isinstance(named, list) or not all(type(i) is int for i in named):
            raise BadFile(f"{self.path}: generation_config.json has a strange eos_token_id.", "Fetch the model again.")
        return self.tokenizer.eos_ids | frozenset(named)

    @cached_property
    def generation_config(self) -> Mapping:
        """generation_config.json, {} where there is none."""
        return self.checkpoint.described("generation_config.json")

    def default_sampling(self) -> SamplingParams:
        """How the model's authors sample from it; greedy where they say so or say nothing."""
        greedy = SamplingParams(repetition=self._authors("repetition_penalty", 1.0))
        if not self.generation_config.get("do_sample"):
            return greedy
        return replace(
            greedy,
            temperature=self._authors("temperature", 1.0),
            top_k=int(self._authors("top_k", 0)),
            top_p=self._authors("top_p", 1.0),
            min_p=self._authors("min_p", 0.0),
        )

    def _authors(self, name: str, neutral: float) -> float:
        """A number of generation_config.json."""
        value = self.generation_config.get(name)
        if value is None:
            return neutral
        if type(value) not in (int, float) or not math.isfinite(value):
            raise BadFile(f"{self.path}: generation_config.json has {name} = {value!r:.60}.", "Fetch the model again.")
        return value

    def encode_prompt(self, prompt: str) -> list[int]:
        """Raw text, plus what the tokenizer itself adds; special tokens in it are parsed."""
        return self.tokenizer.encode(prompt, add_special=True, parse_special=True)

    def encode_messages(self, messages: Sequence[Mapping], **extra) -> list[int]:
        """A conversation through the model's chat template, up to where the answer begins."""
        from .template import encode_chat

        return encode_chat(self.tokenizer, self.template, messages, **extra)

    def generate(
        self, prompt: Sequence[int], options: GenerateOptions, stop: Sequence[str] = ()
    ) -> Iterator[Piece | TextFinished]:
        """Prompt ids -> text events. `stop`: strings that end the answer and are not part of it."""
        if options.stop_ids is None:
            options = replace(options, stop_ids=self.stop_ids)
        return stream_text(self.engine.generate(prompt, options), self.tokenizer, options.stop_ids, stop)

    def adapt(self, chosen: Sequence[tuple[str | Path, float]]) -> None:
        """Attach these adapters (folder, weight), in the place of those attached before; [] detaches all.

        The model stays loaded; what was computed with the old ones is forgotten. Their changes add up, each times its
        weight. Raises what `read_adapter` raises, BadOption for more than one soft prompt or a part of one, and nothing
        has changed.
        """
        if not chosen and not self.attached:
            return
        from .. import adapters  # loaded for those who have some

        modules = adapters.Modules(self.family, self.config)
        attached = tuple(Attached(Path(path), w, adapters.read_adapter(path, modules)) for path, w in chosen)
        weighted = [(a.adapter, a.weight) for a in attached]
        loras = adapters.loras(self.backend, self.weights, self._base, weighted)
        soft = adapters.soft_prompt(self.backend, weighted)
        brought = adapters.replaced(self._base, weighted)
        extra = {name: self.backend.prepare(tensor) for name, tensor in brought.items()}
        if self.config.tied and "embed" in extra:
            extra = {"head": self.weights["embed"]} | extra  # an embedding of its own leaves the head as it was
        old = [w for many in self.decoder.loras.values() for a in many for w in (a.down, a.up)]
        own = set(map(id, self.weights.values()))
        old += [w for w in self.decoder.weights.values() if id(w) not in own]
        old += [self.decoder.soft.embeddings] if self.decoder.soft else []
        self.decoder.loras, self.decoder.weights, self.decoder.soft = loras, {**self.weights, **extra}, soft
        self.attached = attached
        if "engine" in self.__dict__:
            self.engine.recompile()
        for weight in old:
            self.backend.release(weight)

    def _base(self, name: str) -> Tensor:
        """The model's own tensor; the embedding's for a head that is the same."""
        return self.parameters["embed" if name == "head" and self.config.tied else name]

    def close(self) -> None:
        self.adapt([])
        for weight in self.weights.values():
            self.backend.release(weight)
        self.checkpoint.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def open_session(
    model: str | Path,
    *,
    backend: str | Backend | None = None,
    exact: bool = False,
    context: int | None = None,
    threads: int | None = None,
    kv_dtype: str | None = None,
    progress: Callable[[Loading | hub.Fetching], None] = lambda event: None,
    say: Callable[[str], None] = lambda text: None,
) -> Session:
    """Open a model: a folder, a .gguf file, a Hugging Face repo id or a catalog name.

    backend: a name, a Backend, or None for the best that is ready. exact: float32 throughout. context: tokens of
    prompt and answer together; None: what the model was made for, up to 8,192. `say` hears what is fetched from where,
    `progress` how far fetching and then loading are. Raises OnDeviceError's children.
    """
    path = hub.resolve(str(model), say, progress)
    started = time.perf_counter()
    checkpoint = open_checkpoint(path)
    try:
        family, hf_config = family_of(checkpoint)
        config = family.config(hf_config)
        capacity = _capacity(config, context)
        options = {"exact": exact} | ({"threads": threads} if threads else {})
        ops = backend if isinstance(backend, Backend) else create_backend(backend, **options)
        parameters = Parameters(family, config, checkpoint)
        memory.Planner.of(config, parameters, ops, kv_dtype).require(capacity, str(path), say)
        weights = parameters.prepare(ops, _reporter(checkpoint.nbytes, progress))
    except MemoryError:
        checkpoint.close()
        raise OnDeviceError(
            f"There is not enough memory for {path} ({checkpoint.nbytes / 1e9:.1f} GB of weights).",
            "Close other programs, or take a smaller or more quantized model.",
        ) from None
    except BaseException:
        checkpoint.close()
        raise
    decoder = Decoder(config, ops, weights, capacity)
    seconds = time.perf_counter() - started
    return Session(path, family, hf_config, config, decoder, checkpoint, parameters, capacity, seconds, kv_dtype)


def _capacity(config: ModelConfig, context: int | None) -> int:
    if context is None:
        return min(config.context, DEFAULT_CONTEXT)
    if not 1 <= context <= config.context:
        raise BadOption(
            f"A context of {context} tokens is not possible: this model was made for {config.context}.",
            f"Give 1 to {config.context}.",
        )
    return context


def _reporter(total: int, progress: Callable[[Loading], None]) -> Callable[[int], None]:
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        progress(Loading(done, total))

    return report
