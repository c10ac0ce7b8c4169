"""Activation-aware scaling (AWQ, Lin et al. 2024): columns that meet large inputs are scaled up before rounding, which
then costs them less, and what makes those inputs is scaled down as much: the same model, which rounds better.

The scale of column j is E|x_j|^a, with the a of [0, 1] that leaves the least error in what the readers make of x. It is
taken off the norm in front (of attention's and the feed-forward's first maps) or off the rows of `up` (in front of
`down`); where neither stands right in front of a map, and for experts, columns stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...models.config import ModelConfig
from ...models.parameters import Parameters
from ...schemes import quantize_affine, to_float
from ...tensors import Affine, Tensor, store
from .matrices import numbers
from .parallel import side_by_side
from .statistics import Inputs

POWERS = np.linspace(0, 1, 11)
ROWS = 256  # of each reader that are tried
BEHIND_NORMS = (  # a norm -> a map that reads it, if it is there
    ("attn_norm", "attn.q"), ("attn_norm", "attn.qkv"), ("attn_norm", "conv.in"),
    ("mlp_norm", "mlp.up"), ("mlp_norm", "mlp.gate_up"),
)  # fmt: skip


@dataclass
class Scaling:
    """By our names: what a matrix's columns are multiplied by, what rows are divided by, and the norms that changed."""

    columns: dict[str, np.ndarray] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)

    def applied(self, name: str, values: np.ndarray) -> np.ndarray:
        """A matrix with its rows and columns scaled."""
        if name in self.columns:
            values = values * self.columns[name]
        return values / self.rows[name][:, None] if name in self.rows else values

    def hessian(self, name: str, hessian: np.ndarray) -> np.ndarray:
        """Of what then flows in."""
        scale = self.columns.get(name)
        return hessian if scale is None else hessian / np.outer(scale, scale)


def scaling(
    prefix: str, config: ModelConfig, parameters: Parameters, inputs: Inputs, plan: Mapping[str, Affine]
) -> Scaling:
    """For one layer, from what was seen flowing through it."""
    found = Scaling()
    for norm, first in ((f"{prefix}.{norm}", f"{prefix}.{first}") for norm, first in BEHIND_NORMS):
        readers = inputs.readers(first) if first in inputs else []
        if norm in parameters and readers and set(readers) <= set(plan):
            scale = _fold(found, norm, config, parameters, _choose(readers, parameters, inputs, plan))
            found.columns |= dict.fromkeys(readers, scale)
    up, down = f"{prefix}.mlp.up", f"{prefix}.mlp.down"
    gated = f"{prefix}.mlp.gate" in parameters and f"{up}.bias" not in parameters
    if gated and {up, down} <= set(plan) and down in inputs:
        found.columns[down] = found.rows[up] = _choose([down], parameters, inputs, plan)
    return found


def _fold(found: Scaling, norm: str, config: ModelConfig, parameters: Parameters, scale: np.ndarray) -> np.ndarray:
    """Takes the scale off a norm's gain and bias; returns it as it is once they are rounded to how they are stored."""
    tensor = parameters[norm]
    dtype, offset = tensor.format.dtype, np.float32(config.norm_offset)
    gain = to_float(tensor) + offset
    found.norms[norm] = Tensor(tensor.shape, tensor.format, {"weight": store(gain / scale - offset, dtype)})
    made = to_float(found.norms[norm]) + offset
    scale = np.where(made != 0, gain / np.where(made != 0, made, 1), scale).astype(np.float32)
    if f"{norm}.bias" in parameters:
        bias = parameters[f"{norm}.bias"]
        parts = {"weight": store(to_float(bias) / scale, bias.format.dtype)}
        found.norms[f"{norm}.bias"] = Tensor(bias.shape, bias.format, parts)
    return scale


def _choose(readers: Sequence[str], parameters: Parameters, inputs: Inputs, plan: Mapping[str, Affine]) -> np.ndarray:
    """The scale [I] of the columns of all readers."""
    matrices = {name: _sample(numbers(parameters, name)) for name in readers}
    hessian = inputs.gram(readers[0]).astype(np.float32)
    size = inputs.size(readers[0])
    size = np.maximum(size, 1e-4 * (size.max() or 1.0))

    def tried(power: float) -> tuple[float, np.ndarray]:
        scale = size**power
        scale = (scale / np.sqrt(scale.max() * scale.min())).astype(np.float32)
        return sum(_error(matrices[name], scale, hessian, plan[name]) for name in readers), scale

    return min(side_by_side(tried, POWERS), key=lambda found: found[0])[1]


def _sample(values: np.ndarray) -> np.ndarray:
    return values[:: max(1, len(values) // ROWS)]


def _error(values: np.ndarray, scale: np.ndarray, hessian: np.ndarray, form: Affine) -> float:
    rounded = quantize_affine(values * scale, form.bits, form.group_size, form.dtype)
    error = to_float(rounded) / scale - values
    return float(np.einsum("ij,ij->", error @ hessian, error))
