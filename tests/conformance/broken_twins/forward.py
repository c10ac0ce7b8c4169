"""Positions, small operations and weights gone wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ondevice import schemes
from ondevice.backends.base import positions
from ondevice.backends.numerics import ACTIVATIONS, rotate
from ondevice.backends.reference import NumpyKernels, ReferenceBackend
from ondevice.backends.tape import Array
from ondevice.tensors import Affine, Blocks, Dense, Tensor

from . import twin

# ------------------------------------------------------------------------------------------------ positions


@twin("forward")
class PositionsOfPaddingRunOn(ReferenceBackend):
    def positions(self, step, tokens):
        return self.array(step.starts[:, None] + np.arange(tokens, dtype=np.int32))


@twin("compiled")
class PositionsOfTheFirstStep(ReferenceBackend):
    """A host's array in a recording."""

    def positions(self, step, tokens):
        self.first = getattr(self, "first", {})
        return self.first.setdefault((tokens, len(step.starts)), super().positions(step, tokens))


@twin("forward")
class SharpFromTheFirst(ReferenceBackend):
    """The steps of sharpness come a token early."""

    def sharpness(self, step, tokens, every, weight, ahead=0):
        return super().sharpness(step, tokens, every, weight, ahead + 1)


@twin("forward")
class SharpEvenly(ReferenceBackend):
    """Sharpness without its steps."""

    def sharpness(self, step, tokens, every, weight, ahead=0):
        past = (positions(step, tokens)[..., None] + ahead) / every
        return self.array((1 + weight * np.log1p(past)).astype(np.float32))


@twin("compiled")
class SharpnessOfTheFirstStep(ReferenceBackend):
    """A host's array in a recording."""

    def sharpness(self, step, tokens, every, weight, ahead=0):
        self.first = getattr(self, "first", {})
        key = tokens, len(step.starts)
        return self.first.setdefault(key, super().sharpness(step, tokens, every, weight, ahead))


@twin("forward")
class GainsOfTheFirstHead(NumpyKernels):
    def gains(self, gain, x, offset=0.0):
        found = super().gains(gain, x, offset)
        return found[:1] if found.ndim == 2 else found


@twin("forward")
class OffsetWithoutAGain(NumpyKernels):
    def gains(self, gain, x, offset=0.0):
        return super().gains(gain, x, offset) + (offset if gain is None else 0)


@twin("forward")
class RopeTurnsBackwards(NumpyKernels):
    def rope(self, x, step, freqs, interleaved=False, scale=1.0):
        return rotate(x, -self.angles(step, x.shape[1], freqs), interleaved, scale)


@twin("forward")
class RopePairsSwapped(NumpyKernels):
    def rope(self, x, step, freqs, interleaved=False, scale=1.0):
        return super().rope(x, step, freqs, not interleaved, scale)


@twin("forward")
class RopeFromZero(NumpyKernels):
    def rope(self, x, step, freqs, interleaved=False, scale=1.0):
        return super().rope(x, replace(step, starts=np.zeros_like(step.starts)), freqs, interleaved, scale)


@twin("forward")
class RopeOneStart(NumpyKernels):
    def rope(self, x, step, freqs, interleaved=False, scale=1.0):
        starts = np.full_like(step.starts, step.starts[0])
        return super().rope(x, replace(step, starts=starts), freqs, interleaved, scale)


@twin("forward")
class RopeWithoutScale(NumpyKernels):
    def rope(self, x, step, freqs, interleaved=False, scale=1.0):
        return super().rope(x, step, freqs, interleaved)


@twin("forward")
class RopeScalesTheRest(NumpyKernels):
    def rope(self, x, step, freqs, interleaved=False, scale=1.0):
        return super().rope(x, step, freqs, interleaved) * scale


@twin("forward")
class RopeHalvesTheHead(NumpyKernels):
    """Pairs (i, i + d/2) even when only a part of the head turns."""

    def rope(self, x, step, freqs, interleaved=False, scale=1.0):
        r, d = 2 * len(freqs), x.shape[-1]
        if interleaved or r == d:
            return super().rope(x, step, freqs, interleaved, scale)
        order = np.r_[0 : r // 2, d // 2 : d // 2 + r // 2]
        rest = np.setdiff1d(np.arange(d), order)
        turned = super().rope(x[..., np.r_[order, rest]], step, freqs, False, scale)
        return turned[..., np.argsort(np.r_[order, rest])]


# ------------------------------------------------------------------------------------------------ small operations


@twin("forward")
class GateAndUpSwapped(NumpyKernels):
    def gated(self, gate, up, kind):
        return super().gated(up, gate, kind)


@twin("forward")
class OneGeluForBoth(NumpyKernels):
    def act(self, x, kind):
        return super().act(x, "gelu" if kind == "gelu_tanh" else kind)


def leaning(kind: str) -> type:
    """A backend with one activation slightly off, as a rough approximation is."""

    def act(self: NumpyKernels, x: np.ndarray, asked: str) -> np.ndarray:
        y = NumpyKernels.act(self, x, asked)
        return y + np.float32(1e-3) * (np.abs(x) < 4) if asked == kind else y

    return type(f"Leaning{kind}", (NumpyKernels,), {"act": act})


for _kind in ACTIVATIONS:
    twin("forward")(leaning(_kind))


@twin("forward")
class UnknownActivationPasses(NumpyKernels):
    def act(self, x, kind):
        return super().act(x, kind) if kind != "sillu" else x


@twin("forward")
class NormWithoutEps(NumpyKernels):
    def rms_norm(self, x, gain, eps, offset=0.0):
        return super().rms_norm(x, gain, 0.0, offset)


@twin("forward")
class EpsOutsideTheRoot(NumpyKernels):
    def rms_norm(self, x, gain, eps, offset=0.0):
        return x / (np.sqrt(np.mean(x * x, -1, keepdims=True)) + eps) * (self.values(gain) + offset)


@twin("forward")
class NormWithoutOffset(NumpyKernels):
    def rms_norm(self, x, gain, eps, offset=0.0):
        return super().rms_norm(x, gain, eps)


@twin("forward")
class VarianceOfASample(NumpyKernels):
    def layer_norm(self, x, gain, bias, eps):
        n = x.shape[-1]
        middle = x.mean(-1, keepdims=True)
        shrunk = middle + (x - middle) * np.sqrt((n - 1) / n, dtype=np.float32)
        return super().layer_norm(shrunk, gain, bias, eps) * np.sqrt((n - 1) / n, dtype=np.float32)


@twin("forward")
class LayerNormWithoutBias(NumpyKernels):
    def layer_norm(self, x, gain, bias, eps):
        return super().layer_norm(x, gain, None, eps)


@twin("forward")
class SplitInEqualParts(ReferenceBackend):
    def split(self, x, sizes):
        return tuple(Array(self, part) for part in np.array_split(x.data, len(sizes), axis=-1))


@twin("forward")
class AddsInPlace(NumpyKernels):
    def add(self, a, b):
        if np.shape(a) == np.shape(b):
            a += b
            return a
        return a + b


@twin("forward")
class NumbersMadeInteger(NumpyKernels):
    def mul(self, a, b):
        return a * (int(b) if type(b) is float else b)


@twin("forward")
class ReshapesByColumns(NumpyKernels):
    def reshape(self, x, shape):
        return x.reshape(shape, order="F")


@twin("forward")
class SoftcapToOne(NumpyKernels):
    def softcap(self, x, cap):
        return np.tanh(x / cap)


@twin("forward")
class SquaresOverflow(NumpyKernels):
    """The mean of squares in float16, which holds them up to 65,504."""

    def rms_norm(self, x, gain, eps, offset=0.0):
        with np.errstate(over="ignore"):
            squares = (x * x).astype(np.float16).astype(np.float32)
        return x / np.sqrt(squares.mean(-1, keepdims=True) + eps) * (self.values(gain) + offset)


@twin("forward")
class ArraysAreNoWeights(NumpyKernels):
    def rms_norm(self, x, gain, eps, offset=0.0):
        return super().rms_norm(x, np.ones_like(gain) if isinstance(gain, np.ndarray) else gain, eps, offset)


@twin("forward")
class RepackedForLinearAlone(NumpyKernels):
    """A weight that `linear` has used no longer serves `embed`."""

    def linear(self, x, weight, bias=None):
        y = super().linear(x, weight, bias)
        weight.dense = weight.dense[::-1]
        return y

    def embed(self, weight, ids):
        self.values(weight)
        return super().embed(weight, ids)


@twin("forward")
class TakeSorts(NumpyKernels):
    def take(self, x, rows):
        return x[np.sort(rows)]


# ------------------------------------------------------------------------------------------------ weights


class Reading(NumpyKernels):
    """Twins that read weights wrongly override `read`: a tensor to the tensor that they take it for."""

    def prepare(self, tensor):
        return super().prepare(self.read(tensor))


@twin("weights")
class BfloatForFloat16(Reading):
    def read(self, tensor):
        if tensor.format == Dense("bfloat16"):
            halves = tensor.parts["weight"].view(np.float16)
            return replace(tensor, format=Dense("float16"), parts={"weight": np.nan_to_num(halves)})
        return tensor


@twin("weights")
class NibblesSwapped(Reading):
    def read(self, tensor):
        if isinstance(tensor.format, Affine) and tensor.format.bits == 4:
            octets = np.ascontiguousarray(tensor.parts["weight"]).view(np.uint8)
            return replace(tensor, parts=tensor.parts | {"weight": (octets >> 4 | octets << 4).view(np.uint32)})
        return tensor


@twin("weights")
class ScalesWithoutBiases(Reading):
    def read(self, tensor):
        if isinstance(tensor.format, Affine):
            return replace(tensor, parts=tensor.parts | {"biases": np.zeros_like(tensor.parts["biases"])})
        return tensor


@twin("weights")
class ScalesOfTheNextGroup(Reading):
    def read(self, tensor):
        if isinstance(tensor.format, Affine):
            return replace(tensor, parts=tensor.parts | {"scales": np.roll(tensor.parts["scales"], 1, -1)})
        return tensor


def misread(form: Blocks | Dense) -> type:
    """A reader of one format that takes every odd byte for an even one, or the other way round."""

    def read(self: Reading, tensor: Tensor) -> Tensor:
        if tensor.format != form:
            return tensor
        octets = np.ascontiguousarray(tensor.parts["weight"]).view(np.uint8).copy()
        octets[..., 1::2] ^= np.uint8(1 << 4)
        return replace(tensor, parts={"weight": octets.view(tensor.parts["weight"].dtype)})

    return type(f"Misreads{schemes.label(form)}", (Reading,), {"read": read})


for _form in (Dense("float16"), Dense("float32"), *map(Blocks, schemes.LAYOUT)):
    twin("weights")(misread(_form))


@twin("weights")
class LinearWithoutBias(NumpyKernels):
    def linear(self, x, weight, bias=None):
        return super().linear(x, weight)


@twin("weights")
class RoundsActivations(NumpyKernels):
    """int8 activations in a backend that says it is exact."""

    def linear(self, x, weight, bias=None):
        step = np.abs(x).max(-1, keepdims=True) / 127 + 1e-9
        return super().linear(np.rint(x / step) * step, weight, bias)


@twin("weights")
class LastTokenOfMany(NumpyKernels):
    """The road for many tokens stops one short of a full tile."""

    def linear(self, x, weight, bias=None):
        y = super().linear(x, weight, bias)
        if y.size // y.shape[-1] > 32:
            y.reshape(-1, y.shape[-1])[-1] = 0.0
        return y


@twin("weights")
class WritesToTheFile(NumpyKernels):
    def prepare(self, tensor):
        for part in tensor.parts.values():
            part += 0
        return super().prepare(tensor)
