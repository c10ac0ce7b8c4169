"""Losses, gradients, dropout and the optimizer."""

from __future__ import annotations

import numpy as np

from ...tensors import dense
from ..gradients import TRAINABLES, Trainable, draw, gradients
from ..suite import Pair, case, equal, int32


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
    weight, down, up = dense(pair.normal(5, 8)), pair.normal(2, 8), pair.normal(5, 2)
    pair.same("chain", lambda ops, w, a, b: ops.inverse_norm(w, a, b, 0.5), weight, down, up)


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
    from ... import schemes

    codes = pair.random.integers(0, 1 << bits, (5, 64)).astype(np.uint8)
    scales, biases, x = pair.normal(5, 2, scale=0.1), pair.normal(5, 2, scale=0.1), pair.normal(3, 64)
    packed = schemes.pack(codes, bits)

    def fn(ops, scales, biases, x):
        return ops.linear(x, ops.quantized(packed, scales, biases, bits, 32))

    want = x @ (codes.reshape(5, 2, 32) * scales[..., None] + biases[..., None]).reshape(5, 64).T
    pair.close("chain", pair.on(pair.backend, fn, scales, biases, x)[0], want)
