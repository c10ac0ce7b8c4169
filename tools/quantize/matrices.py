"""Which tensors of a model are quantized, in what groups, and what must be true of them before."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ...errors import BadFile, BadOption
from ...models.attention import WHOLE
from ...models.parameters import Parameters
from ...schemes import FP8, label, to_float
from ...tensors import Affine, Dense, Tensor
from .options import GROUPS

KEPT = (".router", ".shared_gate", ".taps", ".bias", "positions", *WHOLE)  # small, and worth more than their bytes
CHUNK = 1 << 21  # numbers looked at in one go


def matrices(parameters: Parameters, prefix: str = "") -> Iterator[str]:
    """Our names of what is quantized: every matrix and stack of experts but the small ones. prefix: of one stage."""
    for name in parameters:
        if prefix and name != prefix and not name.startswith(f"{prefix}."):
            continue
        if len(parameters.shapes[name]) > 1 and not name.endswith(KEPT):
            yield name


def fitted_group(columns: int, wanted: int) -> int | None:
    """The largest group up to `wanted` that divides a row; None: there is none."""
    return next((group for group in GROUPS if group <= wanted and columns % group == 0), None)


def scale_dtype(tensor: Tensor) -> str:
    """Of scales and biases: what the numbers came in, as mx.quantize has it."""
    form = tensor.format
    kept = form.dtype if isinstance(form, Dense | Affine) else "float16"
    return kept if kept in ("float32", "float16", "bfloat16") else "float32"


def affine_bytes(shape: tuple[int, ...], form: Affine) -> int:
    """Bytes of codes, scales and biases."""
    numbers = int(np.prod(shape, dtype=np.int64))
    width = 4 if form.dtype == "float32" else 2
    return numbers * form.bits // 8 + 2 * width * (numbers // form.group_size)


def require_unquantized(parameters: Parameters) -> None:
    """Raises BadOption where some matrix is quantized already; those in FP8 were trained so and count as original."""
    held = (parameters.checkpoint.outline(stored) for n in matrices(parameters) for stored in parameters.stored(n))
    found = sorted({label(tensor.format) for tensor in held if tensor.quantized and tensor.format != FP8})
    if found:
        raise BadOption(
            f"{parameters.checkpoint.path} is quantized already ({', '.join(found)}).",
            "Quantize the original weights, or add --requantize to start from these.",
        )


def require_finite(name: str, values: np.ndarray, parameters: Parameters) -> None:
    """Raises BadFile, naming the tensor, where a number is NaN or infinite."""
    flat = values.reshape(-1)
    for at in range(0, flat.size, CHUNK):
        if not np.isfinite(flat[at : at + CHUNK]).all():
            raise BadFile(
                f"{parameters.checkpoint.path}: {parameters.stored(name)[0]} holds numbers that are NaN or infinite.",
                "Get the model again; training that diverged leaves such weights.",
            )


def numbers(parameters: Parameters, name: str) -> np.ndarray:
    """A parameter as float32, checked; its pages are given back."""
    tensor = parameters[name]
    values = np.array(to_float(tensor))
    for stored in parameters.stored(name):
        parameters.checkpoint.release(stored)
    require_finite(name, values, parameters)
    return values


def require_finite_all(parameters: Parameters) -> None:
    """Before long work: raises BadFile where some number is NaN or infinite."""
    for name in parameters:
        numbers(parameters, name)
