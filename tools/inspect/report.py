"""Everything that `ondevice inspect` says of a model, as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...backends.base import AttentionSpec, Backend
from ...errors import BadOption, OnDeviceError
from ...models.config import LayerConfig, MoEConfig
from ...models.parameters import Parameters, expected
from ...runtime.memory import ROUND, Plan, Planner, memory_bytes, tensors_of
from ...runtime.session import DEFAULT_CONTEXT
from ...tensors import Tensor, blank
from .anatomy import Anatomy, anatomy, promised
from .sources import Source
from .text import Check, Tokens, check_template, tokens


@dataclass(frozen=True)
class Report:
    """layers: what each is made of, in words. lora: choice of matrices -> what is trained at `rank`. kv_bytes: what the
    cache keeps of a token. machine: the memory that the plan must stay below (None: unknown); fitting: what would do
    so, where it does not. tokens, template: None where no tokenizer is here (`untold` says why)."""

    source: Source
    licence: str | None
    anatomy: Anatomy
    layers: tuple[str, ...]
    rank: int
    lora: Mapping[str, int]
    kv_bytes: int
    plan: Plan
    backend: str
    machine: int | None
    fitting: tuple[tuple[str, Plan], ...]
    tokens: Tokens | None
    template: tuple[Check, ...] | None
    untold: str


def report(source: Source, ops: Backend, context: int | None, batch: int, rank: int, kv_dtype: str | None) -> Report:
    """context None: what a session would take. Raises BadOption for one that the model cannot hold, BadFile where the
    tensors do not fit the config."""
    if not 1 <= (context or 1) <= source.config.context:
        raise BadOption(f"The model was made for {source.config.context} tokens, not {context}.", "Give fewer.")
    parts = anatomy(source.family, source.config, source.hf, source.checkpoint)
    planner = Planner(source.config, _tensors(source), ops, kv_dtype)
    one, two = (planner.plan(many * ROUND).cache for many in (1, 2))
    plan = planner.plan(context or min(source.config.context, DEFAULT_CONTEXT), batch)
    most = plan.device or memory_bytes()
    tight = most is not None and plan.needed > most
    found, checks, untold = _text(source)
    return Report(
        source,
        source.licence(),
        parts,
        tuple(map(described, source.config.layers)),
        rank,
        parts.lora(rank),
        (two - one) // ROUND,
        plan,
        ops.name,
        most,
        tuple(planner.fitting(most, plan.context, batch)) if tight else (),
        found,
        checks,
        untold,
    )


def _tensors(source: Source) -> Mapping[str, Tensor]:
    if source.checkpoint is not None:
        return tensors_of(Parameters(source.family, source.config, source.checkpoint))
    shapes = expected(source.config)
    return {name: blank(shape, promised(name, shape, source.hf)) for name, shape in shapes.items()}


def _text(source: Source) -> tuple[Tokens | None, tuple[Check, ...] | None, str]:
    try:
        tokenizer = source.tokenizer()
        found = tokens(tokenizer, source.eos())
        stops = frozenset(id for id, _ in found.stops)
        return found, tuple(check_template(tokenizer, stops)), ""
    except OnDeviceError as error:
        return None, None, error.message


def described(layer: LayerConfig) -> str:
    """A layer in words: 9 heads of 64 (3 kv), MLP of 1536."""
    return f"{_mixer(layer)}, {_feed_forward(layer)}"


def _mixer(layer: LayerConfig) -> str:
    a = layer.mixer
    if not isinstance(getattr(a, "spec", None), AttentionSpec):
        return type(a).__name__.removesuffix("Config").lower()
    kv = f" ({a.kv_heads} kv)" if getattr(a, "kv_heads", a.heads) != a.heads else ""
    size = f" of {a.head_dim}" if hasattr(a, "head_dim") else ""
    window = f", window {a.spec.window}" if a.spec.window else ""
    return f"{a.heads} heads{size}{kv}{window}"


def _feed_forward(layer: LayerConfig) -> str:
    f = layer.feed_forward
    if isinstance(f, MoEConfig):
        return f"{f.per_token} of {f.experts} experts of {f.hidden}"
    return f"MLP of {f.hidden}"
