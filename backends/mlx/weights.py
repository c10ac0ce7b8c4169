"""Weights on MLX: dense ones in the activations' dtype, quantized ones as MLX packs them, used in place.

GGUF's affine types, and those K-quants whose groups have 32 numbers (Q4_K, Q5_K), keep their codes; the K-quants with
groups of 16, which MLX's kernels don't know, become dense. Scales and biases take the activations' dtype: MLX promotes
mixed operands, and one float32 scale would make everything behind it float32.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ... import schemes
from ...tensors import Affine, Blocks, Dense, Tensor, floats

LEAST_GROUP = 32  # of MLX's quantized kernels


class DenseWeight:
    """Numbers of any rank. `linear`'s transposed view and norms' shifted gains are made once."""

    def __init__(self, values: mx.array):
        self.values = values
        self.shape = tuple(values.shape)
        self._transposed: mx.array | None = None
        self._shifted: dict[float, mx.array] = {}

    def numbers(self) -> mx.array:
        return self.values

    def rows(self, ids: mx.array) -> mx.array:
        return self.values[ids]

    def shifted(self, offset: float) -> mx.array:
        """values + offset, as Gemma's norms want their gains; summed in float32."""
        if offset == 0.0:
            return self.values
        if offset not in self._shifted:
            total = self.values.astype(mx.float32) + offset
            self._shifted[offset] = total.astype(self.values.dtype)
        return self._shifted[offset]

    @property
    def transposed(self) -> mx.array:
        if self._transposed is None:
            self._transposed = self.values.swapaxes(-1, -2)
        return self._transposed

    def apply(self, x: mx.array, bias: mx.array | None) -> mx.array:
        """x [..., I] -> [..., O]"""
        return x @ self.transposed if bias is None else mx.addmm(bias, x, self.transposed)

    def gathered(self, x: mx.array, lhs: mx.array | None, experts: mx.array, ordered: bool) -> mx.array:
        """x [..., 1, I] through the experts named, [..., 1, O]; lhs: which x each of them gets."""
        return mx.gather_mm(x, self.transposed, lhs_indices=lhs, rhs_indices=experts, sorted_indices=ordered)

    def clear(self) -> None:
        self.values = self._transposed = None
        self._shifted.clear()


class PackedWeight:
    """MLX's affine quantization: codes [..., O, I * bits / 32] uint32, scales and biases [..., O, I / group]."""

    def __init__(self, codes: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int):
        self.parts = codes, scales, biases
        self.how = {"bits": bits, "group_size": group_size}
        self.shape = (*scales.shape[:-1], scales.shape[-1] * group_size)

    def numbers(self) -> mx.array:
        return mx.dequantize(*self.parts, **self.how)

    def rows(self, ids: mx.array) -> mx.array:
        return mx.dequantize(*(part[ids] for part in self.parts), **self.how)

    def apply(self, x: mx.array, bias: mx.array | None) -> mx.array:
        y = mx.quantized_matmul(x, *self.parts, transpose=True, **self.how)
        return y if bias is None else y + bias

    def gathered(self, x: mx.array, lhs: mx.array | None, experts: mx.array, ordered: bool) -> mx.array:
        return mx.gather_qmm(
            x, *self.parts, lhs_indices=lhs, rhs_indices=experts, transpose=True, sorted_indices=ordered, **self.how
        )

    def clear(self) -> None:
        self.parts = ()


Weight = DenseWeight | PackedWeight


def prepare(tensor: Tensor, dtype: mx.Dtype) -> Weight:
    """A host tensor as MLX uses it; `dtype` is the activations'."""
    if isinstance(tensor.format, Dense):
        return DenseWeight(settled(stored(tensor.parts["weight"], tensor.format.dtype), dtype))
    if isinstance(tensor.format, Affine):
        form, parts = tensor.format, tensor.parts
        scales, biases = (settled(stored(parts[name], form.dtype), dtype) for name in ("scales", "biases"))
        return PackedWeight(
            mx.array(np.asarray(parts["weight"], np.uint32)), scales, biases, form.bits, form.group_size
        )
    return _blocks(tensor, dtype)


def _blocks(tensor: Tensor, dtype: mx.Dtype) -> Weight:
    kind = tensor.format.kind
    if kind in schemes.LEGACY_BITS:
        return prepare(schemes.to_affine(tensor), dtype)
    if tensor.format == schemes.FP8 or (parts := schemes.k_parts(tensor)).group_size < LEAST_GROUP:
        return DenseWeight(settled(mx.array(schemes.to_float(tensor)), dtype))
    bits = schemes.CODE_BITS[kind]
    scales, biases = (settled(mx.array(p), dtype) for p in (parts.scales, parts.biases))
    return PackedWeight(mx.array(schemes.pack(parts.codes, bits)), scales, biases, bits, parts.group_size)


def footprint(tensor: Tensor, dtype: mx.Dtype) -> int:
    """Bytes of what `prepare` makes of it."""
    form, size, width = tensor.format, tensor.size, dtype.size
    if isinstance(form, Affine):
        return tensor.parts["weight"].nbytes + size // form.group_size * 2 * width
    if isinstance(form, Blocks) and form.kind in schemes.LEGACY_BITS:
        return size * schemes.LEGACY_BITS[form.kind] // 8 + size // 32 * 2 * width
    if isinstance(form, Blocks) and form != schemes.FP8 and schemes.k_group(form.kind) >= LEAST_GROUP:
        return size * schemes.CODE_BITS[form.kind] // 8 + size // schemes.k_group(form.kind) * 2 * width
    return size * width


def stored(part: np.ndarray, dtype: str) -> mx.array:
    """A stored part as MLX holds that dtype (bfloat16 arrives as its bit patterns)."""
    if dtype == "bfloat16":
        return mx.array(np.ascontiguousarray(part)).view(mx.bfloat16)
    return mx.array(floats(part, dtype) if dtype == "float64" else np.asarray(part))


def settled(values: mx.array, dtype: mx.Dtype) -> mx.array:
    """Floats as `dtype`, computed now: a pending cast would keep the file's numbers beside the new ones."""
    if values.dtype == dtype or not mx.issubdtype(values.dtype, mx.floating):
        return values
    cast = values.astype(dtype)
    mx.eval(cast)
    return cast
