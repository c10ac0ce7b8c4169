"""Weights as torch tensors: dense ones in the activations' dtype, quantized ones packed as MLX packs them.

Every quantized format stays packed on a GPU, K-quants with their scales in float32, and a weight's numbers are exactly
the file's until a product rounds them to the activations' dtype. On torch's CPU device, which is for tests and for
machines with nothing better, quantized weights become dense when prepared: unpacking them for each token would take
most of the time.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from ... import schemes
from ...tensors import Affine, Dense, Tensor, floats
from . import kernels

PIECE = 1 << 24  # numbers unpacked at a time: 32 MB in bfloat16
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class DenseWeight:
    """Numbers of any rank."""

    def __init__(self, values: torch.Tensor):
        self.values = values
        self.shape = tuple(values.shape)
        self._shifted: dict[float, torch.Tensor] = {}

    def numbers(self, dtype: torch.dtype) -> torch.Tensor:
        return self.values.to(dtype)

    def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.values[ids].to(dtype)

    def shifted(self, offset: float) -> torch.Tensor:
        """values + offset, as Gemma's norms want their gains; summed in float32."""
        if offset == 0.0:
            return self.values
        if offset not in self._shifted:
            self._shifted[offset] = (self.values.float() + offset).to(self.values.dtype)
        return self._shifted[offset]

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., I] -> [..., O]"""
        return F.linear(x, self.values.to(x.dtype), bias)

    def expert(self, e: int) -> DenseWeight:
        return DenseWeight(self.values[e])

    def clear(self) -> None:
        self.values = None
        self._shifted.clear()


class PackedWeight:
    """codes [..., O, I * bits / 32] (uint32 held as int32), scales and biases [..., O, I / group], any float dtype."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, bits: int, group_size: int):
        self.codes, self.scales, self.biases, self.bits, self.group_size = codes, scales, biases, bits, group_size
        self.shape = (*scales.shape[:-1], scales.shape[-1] * group_size)

    def _some(self, which: object) -> PackedWeight:
        return PackedWeight(self.codes[which], self.scales[which], self.biases[which], self.bits, self.group_size)

    def numbers(self, dtype: torch.dtype) -> torch.Tensor:
        return affine(self.codes, self.scales, self.biases, self.bits).to(dtype)

    def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self._some(ids).numbers(dtype)

    def expert(self, e: int) -> PackedWeight:
        return self._some(e)

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            y = _PackedLinear.apply(x, self)
        elif kernels.serves(x):
            y = kernels.linear(x, self.codes, self.scales, self.biases, self.bits, self.group_size)
        else:
            y = torch.cat([F.linear(x, piece.numbers(x.dtype)) for piece in self.pieces()], dim=-1)
        return y if bias is None else y + bias

    def pieces(self) -> list[PackedWeight]:
        """Its rows, some at a time, so that what is unpacked stays small."""
        outputs, inputs = self.shape
        step = max(PIECE // inputs, 1)
        return [self._some(slice(at, at + step)) for at in range(0, outputs, step)]

    def clear(self) -> None:
        self.codes = self.scales = self.biases = None


class _PackedLinear(torch.autograd.Function):
    """x . W^T that keeps the packed weight for the backward pass; torch alone would keep its numbers."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        ctx.weight = weight
        return weight.apply(x.detach(), None)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        pieces = ctx.weight.pieces()
        parts = grad.split([piece.shape[0] for piece in pieces], dim=-1)
        return sum(g @ piece.numbers(grad.dtype) for g, piece in zip(parts, pieces, strict=True)), None


Weight = DenseWeight | PackedWeight


def unpack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words [..., n * bits / 32] -> codes [..., n]; `schemes.unpack` on a device."""
    mask = (1 << bits) - 1
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=codes.device)
        return ((codes[..., None] >> shifts) & mask).flatten(-2)
    octets = codes.contiguous().view(torch.uint8).unflatten(-1, (-1, bits)).long()  # eight codes fill `bits` bytes
    steps = torch.arange(8, device=codes.device)
    stream = (octets << steps[:bits] * 8).sum(dim=-1, keepdim=True)
    return ((stream >> steps * bits) & mask).flatten(-2)


def affine(codes: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, bits: int) -> torch.Tensor:
    """Packed codes with scales and biases [..., O, I / group] -> float32 [..., O, I]"""
    grouped = unpack(codes, bits).float().unflatten(-1, (scales.shape[-1], -1))
    return (grouped * scales.float()[..., None] + biases.float()[..., None]).flatten(-2)


def prepare(tensor: Tensor, dtype: torch.dtype, device: torch.device, packed: bool) -> Weight:
    """A host tensor on the device. dtype: the activations'. packed: leave quantized ones as they are."""
    form, parts = tensor.format, tensor.parts
    if isinstance(form, Dense):
        return DenseWeight(stored(parts["weight"], form.dtype, device).to(dtype))
    if not packed or form == schemes.FP8:
        return DenseWeight(torch.from_numpy(schemes.to_float(tensor)).to(device, dtype))
    if isinstance(form, Affine):
        codes = torch.from_numpy(np.array(parts["weight"], np.uint32).view(np.int32)).to(device)
        scales, biases = (stored(parts[name], form.dtype, device) for name in ("scales", "biases"))
        return PackedWeight(codes, scales, biases, form.bits, form.group_size)
    if form.kind in schemes.LEGACY_BITS:
        return prepare(schemes.to_affine(tensor), dtype, device, packed)
    k, bits = schemes.k_parts(tensor), schemes.CODE_BITS[form.kind]
    arrays = schemes.pack(k.codes, bits).view(np.int32), k.scales, k.biases
    return PackedWeight(*(torch.from_numpy(a).to(device) for a in arrays), bits, k.group_size)


def footprint(tensor: Tensor, dtype: torch.dtype, packed: bool) -> int:
    """Bytes of what `prepare` makes of it."""
    form = tensor.format
    if isinstance(form, Dense) or form == schemes.FP8 or not packed:
        return tensor.size * dtype.itemsize
    if isinstance(form, Affine):
        return tensor.nbytes
    if form.kind in schemes.LEGACY_BITS:
        return tensor.size * schemes.LEGACY_BITS[form.kind] // 8 + tensor.size // 32 * 2 * 2
    return tensor.size * schemes.CODE_BITS[form.kind] // 8 + tensor.size // schemes.k_group(form.kind) * 2 * 4


def stored(part: np.ndarray, dtype: str, device: torch.device) -> torch.Tensor:
    """A stored part as torch holds that dtype (bfloat16 arrives as its bit patterns). Copied: files are read-only."""
    if dtype == "bfloat16":
        return torch.from_numpy(np.array(part).view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(np.array(floats(part, dtype) if dtype == "float64" else part)).to(device)
