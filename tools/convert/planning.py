"""What each tensor becomes, known before anything is read or written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ...checkpoint import Checkpoint, Spec, write_folder
from ...errors import BadOption, Unsupported
from ...models.families import family_of
from ...models.families.writing import Piece
from ...models.families.writing import specs as laid_out
from ...models.parameters import Parameters
from ...runtime.side_files import side_files
from ...schemes import LEGACY_BITS, label, to_affine, to_dense
from ...tensors import Affine, Blocks, Dense, Tensor

Format = Dense | Affine | Blocks
FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Plan:
    """A conversion, ready to run. specs: what will be written; sources: the format each of them has now; notes: what
    people should know."""

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    specs: tuple[Spec, ...]
    sources: tuple[Format, ...]
    notes: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors written."""
        return sum(spec.nbytes for spec in self.specs)

    @property
    def formats(self) -> dict[str, int]:
        """Name of a format -> bytes written in it, most first."""
        sizes: Counter[str] = Counter()
        for spec in self.specs:
            sizes[label(spec.format)] += spec.nbytes
        return dict(sizes.most_common())


def plan(checkpoint: Checkpoint, dtype: str | None = None, dequantize: bool = False) -> Plan:
    """How to convert a checkpoint.

    dtype: float32, float16 or bfloat16 for every dense tensor and for what can't stay quantized; None: as they are.
    dequantize: nothing stays quantized. Raises BadOption when that lacks a dtype, Unsupported when a K-quant does.
    """
    if dtype not in (None, *FLOATS):
        raise BadOption(f"There is no type {dtype!r} to convert to.", f"Choose from {', '.join(FLOATS)}.")
    if dequantize and dtype is None:
        raise BadOption("--dequantize needs a type to go to.", "Add --dtype bfloat16 (or float16, float32).")
    family, hf_config = family_of(checkpoint)
    config = family.config(hf_config)
    parameters = Parameters(family, config, checkpoint)
    _check_k_quants(checkpoint, parameters, dtype)
    pieces = {name: _piece(parameters, name, dtype, dequantize) for name in parameters}
    specs = tuple(laid_out(family.names, config, pieces.values()))
    sources = tuple(_source(parameters, spec.of[0]) for spec in specs)
    notes = (parameters.left_out,) if parameters.apart else ()
    return Plan(checkpoint, _config(checkpoint, hf_config, pieces["embed"].form, dtype), specs, sources, notes=notes)


def plan_hf(checkpoint: Checkpoint, dtype: str | None = None) -> Plan:
    """How to write a checkpoint such that transformers loads it: nothing quantized; in `dtype`, or in the types that
    its tensors have if all are dense, else bfloat16."""
    quantized = any(checkpoint.outline(name).quantized for name in checkpoint.names)
    return plan(checkpoint, dtype or ("bfloat16" if quantized else None), dequantize=quantized)


def convert(plan: Plan, dest: str | Path, written: Callable[[Spec], None] = lambda spec: None) -> None:
    """Run a plan: `dest` appears complete or not at all; peak memory is about one tensor. Raises OnDeviceError."""
    write_folder(dest, plan.config, plan.specs, side_files(plan.checkpoint), written=written)


def _check_k_quants(checkpoint: Checkpoint, parameters: Parameters, dtype: str | None) -> None:
    forms = (checkpoint.outline(stored).format for name in parameters for stored in parameters.stored(name))
    kinds = Counter(form.kind for form in forms if isinstance(form, Blocks) and form.kind not in LEGACY_BITS)
    if kinds and dtype is None:
        held = ", ".join(f"{count} as {kind}" for kind, count in kinds.most_common())
        raise Unsupported(
            f"{checkpoint.path} stores tensors ({held}) in a way that a Hugging Face folder has no exact place for.",
            "Choose a type for them: --dtype bfloat16 (or float16, float32).",
        )


def _piece(parameters: Parameters, name: str, dtype: str | None, dequantize: bool) -> Piece:
    target = _target(_source(parameters, name), dtype, dequantize)
    load, expert = partial(_load, parameters, name, target), partial(_load_expert, parameters, name, target)
    several = len(parameters.stored(name)) > 1
    return Piece(name, parameters.shapes[name], target, load, expert if several else None)


def _source(parameters: Parameters, name: str) -> Format:
    """How a parameter is stored now."""
    return parameters.checkpoint.outline(parameters.stored(name)[0]).format


def _target(source: Format, dtype: str | None, dequantize: bool) -> Dense | Affine:
    if isinstance(source, Dense):
        return Dense(dtype) if dtype and source.dtype in (*FLOATS, "float64") else source
    if isinstance(source, Affine) and not dequantize:
        return source
    if isinstance(source, Blocks) and source.kind in LEGACY_BITS and not dequantize:
        return Affine(LEGACY_BITS[source.kind], 32, "float16")
    return Dense(dtype)


def _load(parameters: Parameters, name: str, target: Format) -> Tensor:
    made = _convert(parameters[name], target)
    for source in parameters.stored(name):
        parameters.checkpoint.release(source)
    return made


def _load_expert(parameters: Parameters, name: str, target: Format, expert: int) -> Tensor:
    """One of experts that are stored one by one."""
    source = parameters.stored(name)[expert]
    made = _convert(parameters.checkpoint[source], target)
    parameters.checkpoint.release(source)
    return made


def _convert(tensor: Tensor, target: Format) -> Tensor:
    if isinstance(target, Dense):
        return to_dense(tensor, target.dtype)
    return to_affine(tensor) if isinstance(tensor.format, Blocks) else tensor


def _config(checkpoint: Checkpoint, hf: Mapping, embedding: Format, dtype: str | None) -> dict[str, Any]:
    """config.json with the type that the weights now have; a folder's own is kept where none was chosen."""
    if checkpoint.kind != "gguf" and dtype is None:
        return dict(hf)
    return {key: value for key, value in hf.items() if key != "torch_dtype"} | {"dtype": embedding.dtype}
