"""Losses, gradients and optimizers gone wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ondevice.backends import moments
from ondevice.backends.numerics import log_softmax, rotate
from ondevice.backends.reference import NumpyKernels, ReferenceBackend
from ondevice.backends.tape import Array, Node

from . import twin


@twin("training")
class LossOfPadding(NumpyKernels):
    def token_loss(self, logits, targets):
        return super().token_loss(logits, np.maximum(targets, 0) if targets.ndim == 1 else targets)


@twin("training")
class LossAveraged(NumpyKernels):
    def token_loss(self, logits, targets):
        loss = super().token_loss(logits, targets)
        return np.full_like(loss, loss.mean())


@twin("training")
class TeacherWithoutSoftmax(NumpyKernels):
    def token_loss(self, logits, targets):
        if targets.ndim == 2:
            return -(targets * log_softmax(logits)).sum(-1)
        return super().token_loss(logits, targets)


@twin("training")
class RopeGradientTurnsForwards(NumpyKernels):
    def rope_vjp(self, grad, need, x, step, freqs, interleaved, scale):
        return (rotate(grad, self.angles(step, x.shape[1], freqs), interleaved, scale),)


@twin("training")
class RowsOverwriteEachOther(NumpyKernels):
    """A token that comes twice gives its embedding one gradient."""

    def embed_vjp(self, grad, need, weight, ids):
        out = np.zeros_like(weight)
        out[ids] = grad
        return (out,)


@twin("training")
class AdapterUnscaled(NumpyKernels):
    """Forward as it should be; the gradient of `up` forgets the scale."""

    def adapted_linear_vjp(self, grad, need, x, weight, bias, down, up, scale):
        *rest, to_up = super().adapted_linear_vjp(grad, need, x, weight, bias, down, up, scale)
        return *rest, None if to_up is None else to_up / scale


@twin("training")
class AdapterDropsBias(NumpyKernels):
    def adapted_linear(self, x, weight, bias, down, up, scale):
        return super().adapted_linear(x, weight, None, down, up, scale)


@twin("training")
class SinksNotTrained(NumpyKernels):
    def attention_vjp(self, grad, need, q, k, v, sinks, spec, step, layer):
        *rest, to_sinks = super().attention_vjp(grad, need, q, k, v, sinks, spec, step, layer)
        return *rest, None if to_sinks is None else to_sinks * 0


@twin("training")
class SharedHeadsGetOneGradient(NumpyKernels):
    """k and v hear of the last query head of their group only."""

    def attention_vjp(self, grad, need, q, k, v, sinks, spec, step, layer):
        to_q = super().attention_vjp(grad, need, q, k, v, sinks, spec, step, layer)[0]
        group = q.shape[2] // k.shape[2]
        last = grad.copy()
        last[:, :, np.arange(q.shape[2]) % group != group - 1] = 0
        return to_q, *super().attention_vjp(last, need, q, k, v, sinks, spec, step, layer)[1:]


@twin("training")
class GradientPastTheSoftcap(NumpyKernels):
    def attention_vjp(self, grad, need, q, k, v, sinks, spec, step, layer):
        return super().attention_vjp(grad, need, q, k, v, sinks, replace(spec, softcap=None), step, layer)


@twin("training")
class NormAsAConstant(NumpyKernels):
    def rms_norm_vjp(self, grad, need, x, gain, eps, offset):
        inverse = 1 / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)
        _, to_gain = super().rms_norm_vjp(grad, need, x, gain, eps, offset)
        return grad * (self.values(gain) + offset) * inverse, to_gain


@twin("training")
class GatesAsConstants(NumpyKernels):
    def gates_vjp(self, grad, need, logits, ids, rule):
        return (np.zeros_like(logits),)


@twin("training")
class GatesGradientUnnormalised(NumpyKernels):
    def gates_vjp(self, grad, need, logits, ids, rule):
        return super().gates_vjp(grad, need, logits, ids, replace(rule, renormalise=False))


@twin("training")
class BiasOfOneExpert(NumpyKernels):
    def expert_linear_vjp(self, grad, need, x, weight, bias, gates, ids):
        to_x, to_weight, to_bias, to_gates = super().expert_linear_vjp(grad, need, x, weight, bias, gates, ids)
        return to_x, to_weight, None if to_bias is None else np.roll(to_bias, 1, 0), to_gates


class LatestOnly(Node):
    __slots__ = ()

    def receive(self, grad):
        self.grad = grad


@twin("training")
class OneUseCounts(ReferenceBackend):
    """A parameter used twice gets the gradient of one use."""

    def value_and_grad(self, fn):
        def forgetful(params, *arrays):
            for array in params.values():
                array.node.__class__ = LatestOnly
            return fn(params, *arrays)

        return super().value_and_grad(forgetful)


@twin("training")
class RecomputedWithoutParams(ReferenceBackend):
    def remat(self, fn):
        return super().remat(lambda params, *arrays: fn({n: Array(self, p.data) for n, p in params.items()}, *arrays))


@twin("training")
class DropoutUnscaled(NumpyKernels):
    def kept(self, shape, rate, seed, step):
        return (super().kept(shape, rate, seed, step) > 0).astype(np.float32)


@twin("training")
class DropoutIgnoresTheStep(NumpyKernels):
    def kept(self, shape, rate, seed, step):
        return super().kept(shape, rate, seed, 0)


@twin("training")
class DropoutOfTheMoment(NumpyKernels):
    """Not a function of seed and step: recomputing gives another pattern."""

    calls = 0

    def kept(self, shape, rate, seed, step):
        self.calls += 1
        return super().kept(shape, rate, seed, step + self.calls)


@twin("training")
class AdamWithoutCorrection(NumpyKernels):
    def adamw(self, param, grad, m, v, step, rate, betas, eps, decay):
        return super().adamw(param, grad, m, v, 10**6, rate, betas, eps, decay)


@twin("training")
class DecayInTheGradient(NumpyKernels):
    """Adam with an L2 term: what AdamW was made against."""

    def adamw(self, param, grad, m, v, step, rate, betas, eps, decay):
        return super().adamw(param, grad + decay * param, m, v, step, rate, betas, eps, 0.0)


@twin("training")
class AdamInPlace(NumpyKernels):
    def adamw(self, param, grad, m, v, step, rate, betas, eps, decay):
        fresh, m, v = super().adamw(param, grad, m, v, step, rate, betas, eps, decay)
        param[:] = fresh
        return param, m, v


@twin("training")
class StaleScales(NumpyKernels):
    """Eight bits: the codes are new, their scales those of the step before."""

    def adamw8(self, param, grad, m, m_scale, r, r_scale, *rest):
        found = super().adamw8(param, grad, m, m_scale, r, r_scale, *rest)
        return found if m is None else (*found[:2], m_scale, *found[3:])


@twin("training")
class SecondMomentFromItsRoot(NumpyKernels):
    """Eight bits: the root that was kept is taken for the moment."""

    def adamw8(self, param, grad, m, m_scale, r, r_scale, *rest):
        if r is not None:
            r, r_scale = moments.compress(moments.expand(r, r_scale, param.shape, False) ** 0.5, False)
        return super().adamw8(param, grad, m, m_scale, r, r_scale, *rest)


@twin("training")
class ScalesWithoutCodes(NumpyKernels):
    def affine_vjp(self, grad, need, scales, biases, codes, bits, group_size):
        to_biases = super().affine_vjp(grad, need, scales, biases, codes, bits, group_size)[1]
        return to_biases, to_biases


@twin("training")
class NormOfColumns(NumpyKernels):
    def inverse_norm(self, weight, down, up, scale):
        adapted = self.values(weight) + scale * (self.values(up) @ self.values(down))
        return 1 / np.linalg.norm(adapted, axis=0)[: len(adapted)]


@twin("training")
class NormNotInverted(NumpyKernels):
    def inverse_norm(self, weight, down, up, scale):
        return 1 / super().inverse_norm(weight, down, up, scale)


@twin("training")
class NormIsDifferentiated(ReferenceBackend):
    def inverse_norm(self, weight, down, up, scale):
        constant = super().inverse_norm(weight, down, up, scale)
        return constant + (self.sum(up) * scale + float(-self.sum(up).data) * scale)


@twin("training")
class NothingBesideTheLoss(ReferenceBackend):
    def value_and_grad(self, fn):
        inner = super().value_and_grad(fn)

        def bare(params, *arrays):
            (loss, _), grads = inner(params, *arrays)
            return (loss, loss), grads

        return bare


@twin("training")
class UnusedParamsAreLeftOut(ReferenceBackend):
    def value_and_grad(self, fn):
        inner = super().value_and_grad(fn)

        def used(params, *arrays):
            result, grads = inner(params, *arrays)
            return result, {name: g for name, g in grads.items() if g.data.any()}

        return used


@twin("training")
class CodesWithoutBiases(NumpyKernels):
    def affine(self, scales, biases, codes, bits, group_size):
        return super().affine(scales, biases * 0, codes, bits, group_size)


@twin("training")
class MeansForSums(NumpyKernels):
    def sum(self, x):
        return np.asarray(x.mean())


@twin("training")
class BiasAsAWeight(NumpyKernels):
    """The gradient of a bias summed over one axis of two."""

    def linear_vjp(self, grad, need, x, weight, bias):
        to_x, to_weight, to_bias = super().linear_vjp(grad, need, x, weight, bias)
        return to_x, to_weight, None if to_bias is None else grad.reshape(-1, grad.shape[-1])[0]


@twin("training")
class RowsTakenTwiceCountOnce(NumpyKernels):
    def take_vjp(self, grad, need, x, rows):
        out = np.zeros_like(x)
        out[rows] = grad
        return (out,)
