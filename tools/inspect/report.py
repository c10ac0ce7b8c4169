"""Everything that `ondevice inspect` says of a model, as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...backends.base import Backend
from ...errors import BadOption, OnDeviceError
from ...machine import memory_bytes
from ...models.config import ConvolutionConfig, DeltaConfig, LatentConfig, LayerConfig, MoEConfig
from ...models.parameters import Parameters, expected
from ...runtime.memory import ROUND, Plan, Planner
from ...runtime.session import DEFAULT_CONTEXT
from ...tensors import blank
from .anatomy import Anatomy, anatomy, promised
from .sources import Source
from .text import Check, Tokens, check_template, tokens


@dataclass(frozen=True)
class Report:
    """layers: what each is made of, in words. lora: choice of matrices -> what is trained at `rank`. kv_bytes: what the
    cache keeps of a token. machine: the memory that the plan must stay below (None: unknown); fitting: what would do
    so, where it does not. tokens, template: None where no tokenizer is here (`untold` says why). left_out: what
    is stored and not used, in words."""

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
    left_out: str


def report(source: Source, ops: Backend, context: int | None, batch: int, rank: int, kv_dtype: str | None) -> Report:
    """context None: what a session would take. Raises BadOption for one that the model cannot hold, BadFile where the
    tensors do not fit the config."""
    if not 1 <= (context or 1) <= source.config.context:
        raise BadOption(f"The model was made for {source.config.context} tokens, not {context}.", "Give fewer.")
    parts = anatomy(source.family, source.config, source.hf, source.checkpoint)
    planner, left_out = _planner(source, ops, kv_dtype)
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
        left_out,
    )


def _planner(source: Source, ops: Backend, kv_dtype: str | None) -> tuple[Planner, str]:
    """And what is left out. From a config alone, experts are taken to stand apart in the files, as they are
    published."""
    if source.checkpoint is not None:
        parameters = Parameters(source.family, source.config, source.checkpoint)
        return Planner.of(source.config, parameters, ops, kv_dtype), parameters.left_out
    shapes = expected(source.config)
    tensors = {name: blank(shape, promised(name, shape, source.hf)) for name, shape in shapes.items()}
    apart = [name for name, shape in shapes.items() if len(shape) > 2]
    return Planner(source.config, tensors, ops, kv_dtype, apart), ""


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
    m = layer.mixer
    if isinstance(m, ConvolutionConfig):
        return f"convolution of {m.taps}"
    if isinstance(m, DeltaConfig):
        return f"gated delta, {m.heads} heads of {m.value_dim}"
    if isinstance(m, LatentConfig):
        return f"{m.heads} heads of {m.nope + m.turning} over a latent of {m.latent}"
    kv = f" ({m.kv_heads} kv)" if m.kv_heads != m.heads else ""
    return f"{m.heads} heads of {m.head_dim}{kv}" + (f", window {m.spec.window}" if m.spec.window else "")


def _feed_forward(layer: LayerConfig) -> str:
    f = layer.feed_forward
    if isinstance(f, MoEConfig):
        shared = f" and one of {f.shared.hidden}" if f.shared else ""
        return f"{f.per_token} of {f.experts} experts of {f.hidden}{shared}"
    return f"MLP of {f.hidden}"
