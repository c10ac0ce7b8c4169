"""Losses, gradients, dropout and the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ... import schemes
from ...backends.base import A, AttentionSpec, Backend, Step
from ...tensors import Dense, Tensor, dense, f32_to_bf16
from ..gradients import TRAINABLES, Trainable, draw, gradients
from ..suite import Pair, case, equal, freqs, given, int32


@case("training", vocab=[6, 4099])
def token_loss(pair: Pair, vocab: int) -> None:
    """Of token ids, some of which don't count; of a teacher; of very confident logits."""
    logits, teacher = pair.normal(5, vocab, scale=3.0), pair.normal(5, vocab)
    targets = int32(0, vocab - 1, -1, 3, -100)
    pair.same("chain", lambda ops, x, t: ops.token_loss(x, t), logits, targets)
    pair.same("chain", lambda ops, x, t: ops.token_loss(x, t), logits, teacher)
    pair.same("chain", lambda ops, x, t: ops.token_loss(x, t), pair.rounded(logits * np.float32(50)), targets)


@case("training", t=TRAINABLES)
def gradient(pair: Pair, t: Trainable) -> None:
    if t.feature not in pair.backend.features:
        return
    params, frozen = draw(t, pair.random)
    params = {name: pair.rounded(p) for name, p in params.items()}
    probe = pair.normal(1024)
    results = [gradients(t, ops, params, frozen, probe) for ops in (pair.backend, pair.reference)]
    (_, y, grads), (_, want_y, want_grads) = results
    pair.close("gradient", y, want_y)
    assert grads.keys() == want_grads.keys(), f"gradients of {sorted(grads)} instead of {sorted(want_grads)}"
    for name, want in want_grads.items():
        try:
            pair.close("gradient", grads[name], want)
        except AssertionError as error:
            raise AssertionError(f"of {name}: {error}") from None


FORMS = {
    "float32": dense,
    "bfloat16": lambda w: Tensor(w.shape, Dense("bfloat16"), {"weight": f32_to_bf16(w)}),
    "float16": lambda w: dense(w.astype(np.float16)),
    **{f"{bits} bits by {group}": partial(schemes.quantize_affine, bits=bits, group_size=group, dtype="float16")
       for bits, group in ((2, 32), (3, 64), (4, 32), (4, 128), (5, 32), (6, 64), (8, 128))},
}  # fmt: skip


@case("training", shape=[(33, 128, 41), (103, 384, 70), (200, 640, 300)], form=FORMS)
def adapter_of_many_tokens(pair: Pair, shape: tuple[int, int, int], form: str) -> None:
    """LoRA over frozen weights in every format, with tokens, inputs and outputs that fill no block of a kernel."""
    tokens, inputs, outputs = shape
    weight, bias = FORMS[form](pair.normal(outputs, inputs, scale=inputs**-0.5)), pair.normal(outputs)
    params = {"x": pair.normal(tokens, inputs), "down": pair.normal(7, inputs, scale=inputs**-0.5)}
    params |= {"up": pair.normal(outputs, 7), "w": pair.normal(outputs, inputs, scale=inputs**-0.5)}

    def fn(ops, p, w, b):
        y = ops.adapted_linear(p["x"], w, b, p["down"], p["up"], 1.5)
        return y + ops.linear(p["x"], p["w"])

    same_gradients(pair, fn, params, weight, dense(bias))


MASKS = {
    "all": AttentionSpec(0.3),
    "window": AttentionSpec(0.3, window=21),
    "chunk": AttentionSpec(0.3, chunk=32),
    "softcap": AttentionSpec(0.5, softcap=2.0, window=50),
}


@case("training", mask=MASKS, segments=[False, True], sinks=[False, True])
def attention_of_many_tokens(pair: Pair, mask: str, segments: bool, sinks: bool) -> None:
    """More queries and keys than a block of a kernel holds; the second row is shorter, its padding counts nothing."""
    B, T, H, K, d, dv = 2, 83, 6, 2, 20, 12
    lengths = int32(T, 70)
    packed = np.sort(pair.ids(5, B, T), axis=1) if segments else None
    step = Step(int32(0, 0), lengths, int32(0, 1), packed)
    params = {"q": pair.normal(B, T, H, d), "k": pair.normal(B, T, K, d), "v": pair.normal(B, T, K, dv)}
    if sinks:
        params["sinks"] = pair.normal(H)
    real = (np.arange(T) < lengths[:, None]).astype(np.float32)[:, :, None, None]

    def fn(ops, p, real):
        return ops.attention(p["q"], p["k"], p["v"], p.get("sinks"), MASKS[mask], step, 0) * real

    same_gradients(pair, fn, params, real)


@case("training")
def functions_of_many_numbers(pair: Pair) -> None:
    """Norms, gates and rotary positions, in rows whose width fills no vector."""
    step = Step(int32(0, 3), int32(37, 37), int32(0, 1))

    def fn(ops, p, gain):
        x = ops.rms_norm(p["x"], gain, 1e-5, 1.0)
        y = ops.gated(x, p["y"], "silu") + ops.gated(x, p["y"], "gelu_tanh") + ops.gated(x, p["y"], "gelu")
        return ops.rope(y.reshape(2, 37, 3, 22), step, freqs(20), False, 1.1).reshape(74, 66)

    params = {"x": pair.normal(74, 66), "y": pair.normal(74, 66)}
    same_gradients(pair, fn, params, dense(pair.normal(66)))


def same_gradients(pair: Pair, fn: Callable, params: dict[str, np.ndarray], *frozen: Any) -> None:
    """fn(ops, params, *frozen) and its gradients are the reference's."""
    probe = np.random.default_rng(1).standard_normal(1 << 17).astype(np.float32)

    def differentiated(ops: Backend) -> dict[str, np.ndarray]:
        held = [given(ops, f) for f in frozen]

        def loss(p: dict[str, A]) -> tuple[A, A]:
            y = fn(ops, p, *held)
            return ops.sum(y * ops.array(probe[: int(np.prod(y.shape))].reshape(y.shape))), y

        (_, y), grads = ops.value_and_grad(loss)({name: ops.array(value) for name, value in params.items()})
        return {"the result": ops.numpy(y), **{name: ops.numpy(g) for name, g in grads.items()}}

    got, wanted = differentiated(pair.backend), differentiated(pair.reference)
    for name, want in wanted.items():
        try:
            pair.close("gradient", got[name], want)
        except AssertionError as error:
            raise AssertionError(f"of {name}: {error}") from None


@case("training")
def an_adapter_in_one(pair: Pair) -> None:
    """What `adapted_linear` says of itself: for one token too, and outside of training."""
    x, w, bias = pair.normal(3, 64), pair.weight(20, 64), dense(pair.normal(20))
    down, up = pair.weight(4, 64), pair.weight(20, 4)

    def composed(ops, x, w, bias, down, up):
        return ops.linear(x, w, bias) + ops.linear(ops.linear(x, down) * 0.5, up)

    want = pair.on(pair.reference, composed, x, w, bias, down, up)[0]
    for rows in (x, x[:1]):
        got = pair.on(pair.backend, lambda ops, x, *rest: ops.adapted_linear(x, *rest, 0.5), rows, w, bias, down, up)[0]
        pair.close("chain", got, want[: len(rows)])


@case("training")
def only_params_are_differentiated(pair: Pair) -> None:
    """The loss, what else fn returns, and gradients under the params' names; nothing else changes."""
    ops = pair.backend
    x, w = pair.normal(3, 4), pair.normal(2, 4)

    def loss(params, x):
        y = ops.linear(x, params["w"])
        return ops.sum(y * y), {"y": y}

    (value, aux), grads = ops.value_and_grad(loss)({"w": ops.array(w)}, ops.array(x))
    y = x @ w.T
    equal("names and shape of the loss", (set(grads), tuple(value.shape)), ({"w"}, ()))
    pair.close("gradient", ops.numpy(value), np.asarray((y * y).sum()))
    pair.close("gradient", ops.numpy(aux["y"]), y)
    pair.close("gradient", ops.numpy(grads["w"]), 2 * y.T @ x)


@case("training")
def dropout(pair: Pair) -> None:
    """A pure function of seed, step and shape; what stays is scaled so that the mean stays."""
    ops, x = pair.backend, np.ones((64, 80), np.float32)

    def dropped(seed: int, step: int) -> np.ndarray:
        return ops.numpy(ops.dropout(ops.array(x), 0.25, seed, step))

    first = dropped(3, 1)
    assert np.array_equal(first, dropped(3, 1)), "the same seed and step give another pattern"
    assert not np.array_equal(first, dropped(3, 2)), "another step gives the same pattern"
    assert not np.array_equal(first, dropped(4, 1)), "another seed gives the same pattern"
    kept = first[first != 0]
    assert abs((first == 0).mean() - 0.25) < 0.04, f"{(first == 0).mean():.2f} dropped instead of 0.25"
    pair.close("dropout", kept, np.full_like(kept, 1 / 0.75))
    none = ops.numpy(ops.dropout(ops.array(x), 0.0, 3, 1))
    assert np.array_equal(none, x), "a rate of 0 changes something"


@case("training")
def dropout_is_differentiated_as_it_was_applied(pair: Pair) -> None:
    """In recomputed blocks too."""
    ops, x = pair.backend, np.ones((8, 9), np.float32)

    def loss(params):
        block = ops.remat(lambda params, x: ops.dropout(x, 0.5, 7, 2))
        y = block({}, params["x"])
        return ops.sum(y), y

    (_, y), grads = ops.value_and_grad(loss)({"x": ops.array(x)})
    pair.close("gradient", ops.numpy(grads["x"]), ops.numpy(y))


@case("training", decay=[0.0, 0.1])
def adamw(pair: Pair, decay: float) -> None:
    """Five steps beside the formula in float64; the old parameters stay as they were."""
    shapes = {"a": (3, 4), "b": (5,)}
    params = {name: pair.normal(*shape) for name, shape in shapes.items()}
    grads = [{name: pair.normal(*shape) for name, shape in shapes.items()} for _ in range(5)]
    ops = pair.backend
    first = current = {name: ops.array(p) for name, p in params.items()}
    state: dict = {}
    for step, grad in enumerate(grads, 1):
        moved = {name: ops.array(g) for name, g in grad.items()}
        current, state = ops.adamw(current, moved, state, step, 0.05, (0.8, 0.95), 1e-6, decay)
    for name, p in params.items():
        want = adamw_by_the_book(p, [g[name] for g in grads], 0.05, (0.8, 0.95), 1e-6, decay)
        pair.close("gradient", ops.numpy(current[name]), want)
        assert np.array_equal(ops.numpy(first[name]), p), "the old parameters were overwritten"


@case("training", decay=[0.0, 0.1])
def adamw_in_eight_bits(pair: Pair, decay: float) -> None:
    """Beside the reference, but for the few numbers that lie on a border between two codes; near the formula; small;
    kept and brought back as a checkpoint does it; arrays of few numbers exactly."""
    shapes = {"many": (65, 67), "few": (5, 7)}
    params = {name: pair.normal(*shape) for name, shape in shapes.items()}
    spread = {name: np.exp(2 * pair.normal(*shape)) for name, shape in shapes.items()}
    grads = [{name: pair.normal(*shape) * spread[name] for name, shape in shapes.items()} for _ in range(5)]

    def run(ops) -> tuple[dict[str, np.ndarray], int]:
        first = current = {name: ops.array(p, "float32") for name, p in params.items()}
        state: dict = {}
        for step, grad in enumerate(grads, 1):
            moved = {name: ops.array(g, "float32") for name, g in grad.items()}
            current, state = ops.adamw(current, moved, state, step, 0.05, (0.8, 0.95), 1e-6, decay, bits=8)
            state = {name: ops.array(np.array(ops.numpy(a)), "float32") for name, a in state.items()}
        assert np.array_equal(ops.numpy(first["many"]), params["many"]), "the old parameters were overwritten"
        held = sum(ops.numpy(a).nbytes for name, a in state.items() if name.startswith("many."))
        return {name: ops.numpy(a) for name, a in current.items()}, held

    (ours, held), (reference, _) = run(pair.backend), run(pair.reference)
    books = {n: adamw_by_the_book(p, [g[n] for g in grads], 0.05, (0.8, 0.95), 1e-6, decay) for n, p in params.items()}
    pair.close("gradient", ours["few"], books["few"])
    assert held < 2.2 * params["many"].size, f"{held} bytes for the moments of {params['many'].size} numbers"
    apart = np.abs(ours["many"] - reference["many"])
    assert (apart > 1e-5).mean() < 0.01, "other codes than the reference's"
    moved, off = np.abs(books["many"] - params["many"]).mean(), np.abs(ours["many"] - books["many"]).mean()
    assert off < 0.06 * moved, f"{off / moved:.1%} of a step is lost"


def adamw_by_the_book(
    p: np.ndarray, grads: list[np.ndarray], rate: float, betas: tuple[float, float], eps: float, decay: float
) -> np.ndarray:
    """Algorithm 2 of Loshchilov and Hutter 2019, in float64."""
    p, m, v = p.astype(np.float64), 0.0, 0.0
    for t, g in enumerate((g.astype(np.float64) for g in grads), 1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        step = (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        p = p - rate * (step + decay * p)
    return p


@case("training")
def inverse_norm(pair: Pair) -> None:
    """In float32 whatever the activations are: what DoRA adds is its difference from a gain of nearly 1."""
    weight, down, up = (np.round(pair.normal(*shape) * 16) / 16 for shape in ((5, 8), (2, 8), (5, 2)))  # in any type
    found = []
    for ops in (pair.backend, pair.reference):
        factors = (ops.array(a.astype(np.float32), "float32") for a in (down, up))
        found.append(ops.numpy(ops.inverse_norm(ops.prepare(dense(weight.astype(np.float32))), *factors, 0.5)))
    pair.close("chain", *found, tolerance=1e-5)


@case("training")
def inverse_norm_is_a_constant(pair: Pair) -> None:
    ops, weight = pair.backend, pair.backend.prepare(dense(pair.normal(5, 8)))
    factors = {"down": ops.array(pair.normal(2, 8)), "up": ops.array(pair.normal(5, 2))}

    def loss(params):
        norms = ops.inverse_norm(weight, params["down"], params["up"], 0.5)
        return ops.sum(norms) + ops.sum(params["down"]) + ops.sum(params["up"]), norms

    _, grads = ops.value_and_grad(loss)(factors)
    for name, grad in grads.items():
        pair.close("gradient", ops.numpy(grad), np.ones(factors[name].shape, np.float32))


@case("training")
def small_steps_are_not_lost(pair: Pair) -> None:
    """A trainable kept in float32 moves by less than a half type could hold, where a product reads it too."""
    ops, steps, rate = pair.backend, 8, 1e-4
    w, x = np.full((3, 4), 1.0, np.float32), ops.array(np.ones((2, 4), np.float32))
    params, state = {"w": ops.array(w, "float32")}, {}
    for step in range(1, steps + 1):
        _, grads = ops.value_and_grad(lambda p: (ops.sum(ops.linear(x, p["w"])), None))(params)
        params, state = ops.adamw(params, grads, state, step, rate)
    moved = 1.0 - ops.numpy(params["w"])
    assert np.allclose(moved, steps * rate, rtol=1e-2), f"{steps} steps of {rate} moved it by {moved.mean():.2e}"


@case("training")
def sums(pair: Pair) -> None:
    x = pair.normal(7, 9)
    got = pair.on(pair.backend, lambda ops, x: ops.sum(x), x)[0]
    equal("shape", got.shape, ())
    pair.close("sum", got, np.asarray(x.sum(dtype=np.float64)), tolerance=10 * pair.tolerance("sum"))


@case("trainable_scales", bits=[2, 3, 4, 8])
def quantized_by_its_parts(pair: Pair, bits: int) -> None:
    """Codes, scales and biases give the weight that they say."""
    codes = pair.random.integers(0, 1 << bits, (5, 64)).astype(np.uint8)
    scales, biases, x = pair.normal(5, 2, scale=0.1), pair.normal(5, 2, scale=0.1), pair.normal(3, 64)
    packed = schemes.pack(codes, bits)

    def fn(ops, scales, biases, x):
        return ops.linear(x, ops.quantized(packed, scales, biases, bits, 32))

    want = x @ (codes.reshape(5, 2, 32) * scales[..., None] + biases[..., None]).reshape(5, 64).T
    pair.close("chain", pair.on(pair.backend, fn, scales, biases, x)[0], want)
