"""A model as one GGUF file that llama.cpp loads: tensors in its names and arrangement, metadata, tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...checkpoint import Checkpoint, Spec, open_checkpoint
from ...checkpoint.write_gguf import ARCHITECTURE, write_gguf
from ...errors import BadOption, OnDeviceError, Unsupported
from ...models.config import ModelConfig
from ...models.families import Family, family_of
from ...models.parameters import Parameters
from ...registry import families
from ...runtime.tokenizer import gguf_tokenizer
from ...schemes import take_rows, to_float
from ...tensors import Blocks, Dense, Tensor, dense
from .blocks import BLOCK, TYPES, Loss, nearest, to_type
from .gguf_metadata import (
    UNREADABLE,
    architecture_keys,
    faults,
    general_keys,
    notes,
    rope_divisors,
    rope_factors,
    sampling_keys,
)
from .planning import Format, Plan

ROPE = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
FULL = ("router", "norm", "taps", "shared_gate")  # small: llama.cpp wants them, and every vector, in float32


@dataclass(frozen=True)
class GgufPlan(Plan):
    """A conversion to GGUF, ready to run. losses: by tensor, filled while it is written."""

    metadata: Mapping[str, Any] = field(default_factory=dict)
    losses: dict[str, Loss] = field(default_factory=dict)

    @property
    def loss(self) -> Loss:
        """All tensors together."""
        every = self.losses.values()
        return Loss(all(x.kept for x in every), sum(x.error for x in every), sum(x.size for x in every))


def plan_gguf(checkpoint: Checkpoint, kind: str | None = None) -> GgufPlan:
    """How to write a checkpoint as GGUF.

    kind: one of `TYPES` for every matrix; None: the type that each has, or the nearest one. Raises BadOption for a
    type that can't be written, Unsupported for a model that llama.cpp's format has no place for.
    """
    family, hf = family_of(checkpoint)
    config, wanted = family.config(hf), _type(kind)
    parameters = Parameters(family, config, checkpoint)
    tokenizer = _tokenizer(checkpoint, config)
    refused: dict[str, list[str]] = {}
    for architecture in _architectures(family):
        losses: dict[str, Loss] = {}
        found = list(_specs(parameters, architecture, config, wanted, losses))
        specs, sources = tuple(spec for spec, _ in found), tuple(source for _, source in found)
        metadata = _metadata(checkpoint, architecture, config, hf, specs) | tokenizer
        wrong = faults(architecture, config, metadata, specs, checkpoint.path)
        if not wrong:
            told = (*notes(architecture, config), *([parameters.left_out] if parameters.apart else []))
            return GgufPlan(checkpoint, hf, specs, sources, metadata, losses, notes=told)
        refused[architecture.gguf.architecture] = wrong
    raise _no_place(checkpoint.path, refused)


def _no_place(path: Path, refused: Mapping[str, list[str]]) -> Unsupported:
    nearest, wrong = min(refused.items(), key=lambda item: (UNREADABLE in item[1], len(item[1])))
    return Unsupported(
        f"{path} has no like among llama.cpp's architectures; a {nearest} would differ in {', '.join(wrong[:5])}.",
        "Keep it as a folder: --to hf or --to mlx.",
    )


def _architectures(family: Family) -> list[Family]:
    """The family itself if llama.cpp has a name for it, else those that it may pass for: as a Mistral is a Llama."""
    if family.gguf:
        return [family]
    return sorted((f for f in families().values() if f.gguf), key=lambda f: (f.name != "llama", f.name))


def convert_gguf(plan: GgufPlan, dest: str | Path, written: Callable[[Spec], None] = lambda spec: None) -> None:
    """Run a plan: `dest` appears complete or not at all, read back before it gets its name; peak memory is about one
    tensor. `plan.losses` is filled on the way. Raises OnDeviceError."""
    write_gguf(dest, plan.metadata, plan.specs, written, check=_opens)


def _opens(path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        family, hf = family_of(checkpoint)
        Parameters(family, family.config(hf), checkpoint)


def _type(kind: str | None) -> Dense | Blocks | None:
    if kind is None or kind.lower() in TYPES:
        return TYPES[kind.lower()] if kind else None
    if "_k" in kind.lower() or kind.lower().startswith("iq"):
        raise BadOption(
            f"{kind} cannot be written here: the gguf package quantizes to {', '.join(TYPES)}.",
            f"Write f16 or bf16, then run llama.cpp's own tool on it: llama-quantize FILE {kind.upper()}.",
        )
    raise BadOption(f"GGUF has no type {kind!r}.", f"Choose from {', '.join(TYPES)}.")


def _form(name: str, tensor: Tensor, wanted: Dense | Blocks | None) -> Dense | Blocks:
    """What one parameter is stored as."""
    if len(tensor.shape) == 1 or name.endswith(FULL):
        return Dense("float32")
    if wanted is None:
        return nearest(tensor)
    if isinstance(wanted, Blocks) and tensor.shape[-1] % BLOCK:
        return Dense("float16")  # rows that blocks don't fill; llama.cpp does the same
    return wanted


# ------------------------------------------------------------------------------------------------ tensors


def _specs(
    parameters: Parameters, family: Family, config: ModelConfig, wanted: Dense | Blocks | None, losses: dict[str, Loss]
) -> Iterator[tuple[Spec, Format]]:
    """What is written, each with the format that it has now."""
    for name, tensor in _rope_tensors(parameters.checkpoint, config).items():
        yield Spec(name, tensor.shape, tensor.format, lambda tensor=tensor: tensor), tensor.format
    for name in parameters:
        source = parameters[name]
        form = _form(name, source, wanted)
        spelled = family.gguf.names.spell(name)
        load = partial(_load, parameters, family, config, name, spelled, form, losses)
        yield Spec(spelled, parameters.shapes[name], form, load), source.format


def _load(parameters, family, config, name, spelled, form, losses) -> Tensor:
    source = parameters[name]
    arranged = _rearranged(family, config, name, source)
    try:
        made, losses[spelled] = to_type(arranged, form)
    except OnDeviceError as error:
        raise type(error)(f"{spelled} cannot be written: {error.message}.", error.hint) from None
    for stored in parameters.stored(name):
        parameters.checkpoint.release(stored)
    return made


def _rearranged(family: Family, config: ModelConfig, name: str, tensor: Tensor) -> Tensor:
    """Hugging Face's arrangement into llama.cpp's: what the family does to a GGUF's tensor, undone.

    That is an order of rows or a constant that is added, and shows on rows that hold their own number.
    """
    arrange = family.gguf.arrange
    if family.gguf.rearrange:
        return family.gguf.rearrange(name, tensor, config)
    if arrange is None:
        return tensor
    count = tensor.shape[0]
    probe = dense(np.arange(count, dtype=np.float64).reshape(-1, *[1] * (len(tensor.shape) - 1)))
    shown = to_float64(arrange(name, probe, config)).reshape(count)
    order = shown.astype(np.int64)
    if (np.sort(order) == np.arange(count)).all():
        return tensor if (order == np.arange(count)).all() else take_rows(tensor, np.argsort(order))
    return dense(to_float(tensor) - np.float32(shown[0]))


def to_float64(tensor: Tensor) -> np.ndarray:
    return tensor.parts["weight"].astype(np.float64)


def _rope_tensors(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, Tensor]:
    """What llama.cpp has as tensors of how positions are scaled."""
    if found := {name: checkpoint[name] for name in ROPE if name in checkpoint}:  # another GGUF's, as they are
        return found
    made = zip(ROPE, (rope_divisors(config), *rope_factors(config)), strict=True)
    return {name: dense(values.astype(np.float32)) for name, values in made if values is not None}


# ------------------------------------------------------------------------------------------------ metadata


def _metadata(
    checkpoint: Checkpoint, family: Family, config: ModelConfig, hf: Mapping, specs: Sequence[Spec]
) -> dict[str, Any]:
    metadata = general_keys(checkpoint, specs) | {ARCHITECTURE: family.gguf.architecture}
    if checkpoint.kind != "gguf":
        metadata |= sampling_keys(checkpoint.described("generation_config.json"))
    return metadata | architecture_keys(family, config, hf)


def _tokenizer(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, Any]:
    if checkpoint.kind == "gguf":
        return {key: checkpoint.metadata[key] for key in checkpoint.metadata if key.startswith("tokenizer.")}
    return gguf_tokenizer(checkpoint.path, config.vocab)
