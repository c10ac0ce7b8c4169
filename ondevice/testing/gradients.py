"""Small trainable functions, one or more for each operation, and how to differentiate by central differences.

The suite compares a backend's gradients with the reference's; the reference's own, in float64, are held against
central differences by `tests/conformance/test_reference.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import schemes
from ..backends.base import A, AttentionSpec, Backend, RouteRule, Step
from ..tensors import dense
from .suite import freqs, given, int32


@dataclass(frozen=True)
class Trainable:
    """`fn(ops, params, frozen) -> array`. params: name -> shape (and a scale); frozen: made by `fixed(random)`."""

    name: str
    fn: Callable[[Backend, Mapping[str, A], Mapping[str, Any]], A] = field(repr=False)
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    fixed: Callable[[np.random.Generator], dict[str, Any]] = field(default=lambda random: {}, repr=False)
    feature: str = "training"


TRAINABLES: list[Trainable] = []


def trainable(
    fixed: Callable[[np.random.Generator], dict[str, Any]] = lambda random: {}, feature: str = "training",
    **shapes: tuple[int, ...],
) -> Callable:  # fmt: skip
    """Registers fn(ops, p, frozen) with parameters of these shapes."""

    def register(fn: Callable) -> Callable:
        TRAINABLES.append(Trainable(fn.__name__, fn, shapes, fixed, feature))
        return fn

    return register


def draw(t: Trainable, random: np.random.Generator) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Float32 values for its parameters and what stays fixed."""
    params = {
        name: random.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5 if name[0] == "w" else 1.0)
        for name, shape in t.shapes.items()
    }
    return params, t.fixed(random)


def loss_of(t: Trainable, ops: Backend, frozen: Mapping[str, Any], probe: np.ndarray) -> Callable:
    """fn(params, probe) -> (sum of result * probe, result): every number of the result counts, each differently."""

    def loss(params: Mapping[str, A], probe: A) -> tuple[A, A]:
        y = t.fn(ops, params, frozen)
        return ops.sum(y * probe.reshape(*y.shape)), y

    return loss


def gradients(
    t: Trainable, ops: Backend, params: Mapping[str, np.ndarray], frozen: Mapping[str, Any], probe: np.ndarray
) -> tuple[float, np.ndarray, dict[str, np.ndarray]]:
    """Loss, result and gradients, on the host. probe: at least as many numbers as the result has."""
    held = {name: given(ops, value) for name, value in frozen.items()}
    arrays = {name: ops.array(value, "float32" if name[0] == "w" else None) for name, value in params.items()}
    size = int(np.prod(t.fn(ops, arrays, held).shape))
    loss = loss_of(t, ops, held, probe)
    (value, y), grads = ops.value_and_grad(loss)(arrays, ops.array(probe[:size]))
    return float(ops.numpy(value)), ops.numpy(y), {name: ops.numpy(g) for name, g in grads.items()}


def central_differences(
    t: Trainable, ops: Backend, params: Mapping[str, np.ndarray], frozen: Mapping[str, Any], probe: np.ndarray,
    step: float = 1e-5,
) -> dict[str, np.ndarray]:  # fmt: skip
    """The gradients by (f(p + h) - f(p - h)) / 2h, one number at a time; `ops` in float64."""
    held = {name: given(ops, value) for name, value in frozen.items()}

    def value(moved: Mapping[str, np.ndarray]) -> float:
        y = ops.numpy(t.fn(ops, {name: ops.array(p) for name, p in moved.items()}, held))
        return float((y.ravel() * probe[: y.size]).sum())

    out = {}
    for name, param in params.items():
        grad = np.zeros(param.shape)
        for at in np.ndindex(param.shape):
            up, down = ({**params, name: param.astype(np.float64)} for _ in range(2))
            up[name][at] += step
            down[name] = down[name].copy()
            down[name][at] -= step
            grad[at] = (value(up) - value(down)) / (2 * step)
        out[name] = grad
    return out


# ------------------------------------------------------------------------------------------------ arithmetic, moving


@trainable(x=(2, 3, 4), y=(2, 3, 4), row=(4,), one=(1, 3, 1))
def arithmetic(ops, p, frozen):
    return (p["x"] + p["row"]) * p["y"] * p["row"] + p["x"] * p["one"] + p["one"] * 2.0 + 1.0


@trainable(x=(5, 4))
def moving(ops, p, frozen):
    a, b = ops.split(ops.take(p["x"], int32(4, 0, 0, 2)), [1, 3])
    return (b * a).reshape(2, 6)


@trainable(x=(3, 2))
def used_many_times(ops, p, frozen):
    y = p["x"] * p["x"] + p["x"]
    return y * p["x"] + y


@trainable(x=(2, 3), unused=(2,))
def unused(ops, p, frozen):
    return p["x"] * 2.0


# ------------------------------------------------------------------------------------------------ linear maps


@trainable(x=(2, 3, 6), w=(5, 6), b=(5,))
def linear(ops, p, frozen):
    return ops.linear(p["x"], p["w"], p["b"])


def _frozen_weights(random: np.random.Generator) -> dict[str, Any]:
    """The same matrix [5, 32], dense and quantized."""
    values = random.standard_normal((5, 32), np.float32) * np.float32(0.2)
    return {"dense": dense(values), "affine": schemes.quantize_affine(values, 4, 32, "float32")}


@trainable(_frozen_weights, x=(2, 3, 32))
def through_frozen_weights(ops, p, frozen):
    return ops.linear(p["x"], frozen["dense"]) + ops.linear(p["x"], frozen["affine"]) * 0.5


@trainable(_frozen_weights, x=(3, 32), w_down=(2, 32), w_up=(5, 2))
def adapter(ops, p, frozen):
    """LoRA over a quantized weight."""
    low = ops.linear(ops.linear(p["x"], p["w_down"]), p["w_up"])
    return ops.linear(p["x"], frozen["affine"]) + low * 1.5


@trainable(_frozen_weights, x=(3, 32), w_down=(2, 32), w_up=(5, 2), b=(5,))
def adapter_in_one(ops, p, frozen):
    return ops.adapted_linear(p["x"], frozen["affine"], p["b"], p["w_down"], p["w_up"], 1.5)


@trainable(lambda random: {"ids": int32(1, 4, 4).reshape(1, 3)}, w=(6, 4))
def embed_and_tied_head(ops, p, frozen):
    return ops.linear(ops.embed(p["w"], frozen["ids"]), p["w"])


def _codes(random: np.random.Generator) -> dict[str, Any]:
    return {"codes": _Host(schemes.pack(random.integers(0, 16, (5, 64)).astype(np.uint8), 4))}


class _Host:
    """A host array that stays one (`given` turns bare ndarrays into the backend's)."""

    def __init__(self, values: np.ndarray):
        self.values = values


@trainable(_codes, "trainable_scales", scales=(5, 2), biases=(5, 2), x=(3, 64))
def quantized(ops, p, frozen):
    return ops.linear(p["x"], ops.quantized(frozen["codes"].values, p["scales"], p["biases"], 4, 32))


# ------------------------------------------------------------------------------------------------ norms and functions


@trainable(x=(2, 3, 6), gain=(6,))
def rms_norm(ops, p, frozen):
    return ops.rms_norm(p["x"], p["gain"], 1e-2, 1.0)


@trainable(lambda random: {"gain": dense(random.standard_normal(6, np.float32))}, x=(2, 2, 3, 6))
def rms_norm_of_heads(ops, p, frozen):
    return ops.rms_norm(p["x"], frozen["gain"], 1e-5) + ops.rms_norm(p["x"], None, 1e-2) * 0.5


@trainable(lambda random: {"gain": dense(random.standard_normal(18, np.float32))}, x=(2, 2, 3, 6))
def rms_norm_of_heads_with_gains_of_their_own(ops, p, frozen):
    return ops.rms_norm(p["x"], frozen["gain"], 1e-5)


@trainable(x=(2, 2, 3, 6), first=(18,), second=(18,))
def gains_of_heads(ops, p, frozen):
    return ops.rms_norm(p["x"], p["first"], 1e-2, 1.0) + ops.layer_norm(p["x"], p["second"], None, 1e-2)


@trainable(x=(2, 3, 6), gain=(6,), bias=(6,))
def layer_norm(ops, p, frozen):
    return ops.layer_norm(p["x"], p["gain"], p["bias"], 1e-2) + ops.layer_norm(p["x"], p["gain"], None, 1e-2) * 0.3


@trainable(x=(3, 4), y=(3, 4))
def functions(ops, p, frozen):
    total = ops.softcap(p["x"], 1.5)
    for kind in ("silu", "gelu", "gelu_tanh", "relu2", "sigmoid", "tanh", "clamp", "clamped_swish"):
        total = total + ops.act(p["x"], kind) * ops.gated(p["y"], p["x"], kind)
    return total


# ------------------------------------------------------------------------------------------------ attention


def _rope(interleaved: bool) -> Callable:
    def fn(ops, p, frozen):
        step = Step(int32(0, 3), int32(4, 4), int32(0, 1))
        return ops.rope(p["x"], step, freqs(4), interleaved, 1.2)

    fn.__name__ = "rope_interleaved" if interleaved else "rope"
    return fn


for _interleaved in (False, True):
    trainable(x=(2, 4, 2, 6))(_rope(_interleaved))

QKV = {"q": (2, 5, 4, 6), "k": (2, 5, 2, 6), "v": (2, 5, 2, 3)}


@trainable(**QKV)
def attention(ops, p, frozen):
    return ops.attention(p["q"], p["k"], p["v"], None, AttentionSpec(0.4), Step.whole(2, 5), 0)


@trainable(**QKV, sinks=(4,))
def attention_with_everything(ops, p, frozen):
    segments = np.array([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]], np.int32)
    spec = AttentionSpec(0.8, window=3, softcap=1.5)
    return ops.attention(p["q"], p["k"], p["v"], p["sinks"], spec, Step.whole(2, 5, segments), 0)


@trainable(**QKV)
def attention_in_chunks(ops, p, frozen):
    return ops.attention(p["q"], p["k"], p["v"], None, AttentionSpec(0.4, chunk=2), Step.whole(2, 5), 0)


LATENTS = {"q_nope": (1, 4, 2, 3), "q_rope": (1, 4, 2, 2), "c": (1, 4, 5), "k_rope": (1, 4, 2)}


@trainable(feature="latent", wk=(2, 3, 5), wv=(2, 4, 5), **LATENTS)
def latent_attention(ops, p, frozen):
    arrays = (p[name] for name in ("q_nope", "q_rope", "c", "k_rope", "wk", "wv"))
    return ops.latent_attention(*arrays, AttentionSpec(0.5), Step.whole(1, 4), 0)


@trainable(feature="recurrent", x=(2, 6, 3), w=(3, 4), bias=(3,))
def short_convolution(ops, p, frozen):
    segments = np.array([[0, 0, 1, 1, 1, 1], [0] * 6], np.int32)
    packed = ops.short_convolution(p["x"], p["w"], p["bias"], Step.whole(2, 6, segments), 0)
    return packed + ops.short_convolution(p["x"], p["w"], None, Step.whole(2, 6), 0) * 0.5


DELTA = {"q": (2, 5, 2, 4), "k": (2, 5, 2, 4), "v": (2, 5, 4, 3), "a": (2, 5, 4), "b": (2, 5, 4)}


@trainable(feature="recurrent", **DELTA, rate=(4,), shift=(4,))
def gated_delta(ops, p, frozen):
    inputs = [p[name] for name in ("q", "k", "v", "a", "b", "rate", "shift")]
    segments = np.array([[0, 0, 1, 1, 1], [0] * 5], np.int32)
    packed = ops.gated_delta(*inputs, Step.whole(2, 5, segments), 0)
    return packed + ops.gated_delta(*inputs, Step.whole(2, 5), 0) * 0.5


# ------------------------------------------------------------------------------------------------ experts


def _moe(name: str, rule: RouteRule) -> None:
    def fn(ops, p, frozen):
        routing = ops.route(p["logits"], 2, rule)
        inner = ops.act(ops.expert_linear(p["x"], p["w"], routing, p["b"]), "silu")
        return ops.combine(ops.expert_linear(inner, p["w_down"], routing), routing)

    fn.__name__ = f"experts_{name}"
    shapes = {"x": (5, 4), "logits": (5, 6), "w": (6, 3, 4), "b": (6, 3), "w_down": (6, 4, 3)}
    trainable(feature="experts", **shapes)(fn)


_moe("softmax", RouteRule())
_moe("as_they_are", RouteRule(renormalise=False, scale=1.7))
_moe("sigmoid", RouteRule("sigmoid", scale=2.0))
_moe("rivals", RouteRule("sparsemixer", renormalise=False, jitter=0.4))
_moe("input", RouteRule("sigmoid", renormalise=False, gate_on_input=True))


def _frozen_experts(random: np.random.Generator) -> dict[str, Any]:
    values = random.standard_normal((4, 3, 32), np.float32) * np.float32(0.2)
    return {
        "experts": schemes.quantize_affine(values, 4, 32, "float32"),
        "logits": random.standard_normal((5, 4), np.float32),
    }


@trainable(_frozen_experts, "experts", x=(5, 32), w_down=(4, 2, 32), w_up=(4, 3, 2))
def expert_adapter(ops, p, frozen):
    """LoRA over quantized experts."""
    routing = ops.route(frozen["logits"], 2, RouteRule())
    low = ops.expert_linear(ops.expert_linear(p["x"], p["w_down"], routing), p["w_up"], routing)
    return ops.expert_linear(p["x"], frozen["experts"], routing) + low * 1.5


# ------------------------------------------------------------------------------------------------ training


@trainable(lambda random: {"targets": int32(2, -1, 0, 5)}, logits=(4, 6))
def token_loss(ops, p, frozen):
    return ops.token_loss(p["logits"], frozen["targets"])


@trainable(lambda random: {"teacher": random.standard_normal((4, 6), np.float32)}, logits=(4, 6))
def token_loss_of_a_teacher(ops, p, frozen):
    return ops.token_loss(p["logits"], frozen["teacher"])


@trainable(x=(2, 4, 6), w=(6, 6))
def rematerialised(ops, p, frozen):
    def inner(params, x):
        return ops.act(ops.linear(x, params["w"]), "tanh") + x

    block = ops.remat(inner)
    return block({"w": p["w"]}, block({"w": p["w"]}, p["x"] * 2.0))
