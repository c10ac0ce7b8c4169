"""Operations without state: arithmetic, norms, functions, positions, moving numbers about."""

from __future__ import annotations

import numpy as np

from ...backends.base import Step
from ...errors import Unsupported
from ...tensors import dense
from ..suite import Pair, case, equal, freqs, int32


@case()
def arithmetic(pair: Pair) -> None:
    x, y, row = pair.normal(2, 3, 8), pair.normal(2, 3, 8), pair.normal(8)
    pair.same("add", lambda ops, x, y, row: x + y, x, y, row)
    pair.same("add", lambda ops, x, y, row: (x + row, row + x), x, y, row)
    pair.same("add", lambda ops, x, y, row: (x + 0.5, 0.5 + x), x, y, row)
    pair.same("mul", lambda ops, x, y, row: x * y, x, y, row)
    pair.same("mul", lambda ops, x, y, row: (x * row, row * x), x, y, row)
    column = pair.normal(2, 3, 1)
    pair.same("mul", lambda ops, x, column: (x * column, x.reshape(6, 8) * column.reshape(6, 1)), x, column)
    pair.same("mul", lambda ops, x, y, row: (x * -2.5, -2.5 * x), x, y, row)


@case()
def arithmetic_keeps_its_operands(pair: Pair) -> None:
    x, y = pair.normal(3, 8), pair.normal(3, 8)
    a, b = pair.backend.array(x), pair.backend.array(y)
    a + b, a * b, a + 1.0, a * 2.0
    equal("the left operand", pair.backend.numpy(a), x)
    equal("the right operand", pair.backend.numpy(b), y)


@case()
def reshape(pair: Pair) -> None:
    x = pair.normal(2, 3, 8)
    pair.same("reshape", lambda ops, x: (x.reshape(2, 3, 2, 4), x.reshape(-1, 8), x.reshape(48)), x)


@case()
def reshape_of_a_piece(pair: Pair) -> None:
    """A part of a fused projection becomes heads: a view of a view."""
    x, gain = pair.normal(2, 3, 24), pair.weight(4)

    def heads(ops, x, gain):
        q, k = ops.split(x, [16, 8])
        return ops.rms_norm(q.reshape(2, 3, 4, 4), gain, 1e-6), k.reshape(2, 3, 2, 4) + 1.0, k * 2.0

    pair.same("chain", heads, x, gain)


@case()
def positions(pair: Pair) -> None:
    """Padding stands where its row's last token does."""
    step = Step(int32(0, 7, 3, 5), int32(4, 2, 1, 0), int32(0, 1, 2, 3))
    want = np.array([[0, 1, 2, 3], [7, 8, 8, 8], [3, 3, 3, 3], [5, 5, 5, 5]], np.int32)
    equal("positions", pair.backend.numpy(pair.backend.positions(step, 4)), want)
    pair.same("embed", lambda ops, table: ops.embed(table, ops.positions(step, 4)), pair.weight(12, 6))


@case(ahead=[0, 1])
def sharpness(pair: Pair, ahead: int) -> None:
    """One for each of the first `every` tokens, then more and more; of padding as of the row's last token."""
    step = Step(int32(0, 7, 40), int32(4, 2, 1), int32(0, 1, 2))
    x = pair.normal(3, 4, 6)
    pair.same("mul", lambda ops, x: x * ops.sharpness(step, 4, 3, 0.5, ahead), x)
    got = pair.backend.numpy(pair.backend.sharpness(step, 4, 3, 0.5, ahead))[2, 0, 0]
    pair.close("mul", np.float32(got), np.float32(1 + 0.5 * np.log(1 + (40 + ahead) // 3)))


@case(shape=[(1, 1, 32), (2, 7, 33)])
def split(pair: Pair, shape: tuple[int, ...]) -> None:
    pair.same("split", lambda ops, x: ops.split(x, [5, 1, shape[-1] - 6]), pair.normal(*shape))


@case()
def take(pair: Pair) -> None:
    rows = int32(6, 0, 3, 3)
    pair.same("take", lambda ops, x: ops.take(x, rows), pair.normal(7, 5))
    pair.same("take", lambda ops, x: ops.take(x, rows[:1]), pair.normal(7, 5, 2))


@case(shape=[(1, 1, 32), (2, 7, 33), (2, 3, 4, 8), (5, 576)], offset=[0.0, 1.0])
def rms_norm(pair: Pair, shape: tuple[int, ...], offset: float) -> None:
    x, gain = pair.normal(*shape), pair.weight(shape[-1])
    pair.same("rms_norm", lambda ops, x, g: ops.rms_norm(x, g, 1e-5, offset), x, gain)


@case(scale=[1e-4, 300.0])
def rms_norm_of_any_size(pair: Pair, scale: float) -> None:
    """eps counts for small numbers; large ones must not overflow their squares."""
    x, gain = pair.normal(3, 64, scale=scale), pair.weight(64)
    pair.same("rms_norm", lambda ops, x, g: ops.rms_norm(x, g, 1e-6), x, gain)


@case()
def rms_norm_with_an_array(pair: Pair) -> None:
    pair.same("rms_norm", lambda ops, x, g: ops.rms_norm(x, g, 1e-5), pair.normal(2, 3, 16), pair.normal(16))


@case(eps=[1e-5, 0.3])
def norms_without_a_gain(pair: Pair, eps: float) -> None:
    x = pair.normal(2, 7, 3, 10) + np.float32(0.5)
    pair.same("rms_norm", lambda ops, x: (ops.rms_norm(x, None, eps), ops.rms_norm(x, None, eps, 1.0)), pair.rounded(x))
    pair.same("layer_norm", lambda ops, x: ops.layer_norm(x, None, None, eps), pair.rounded(x))


@case()
def norms_of_heads_with_gains_of_their_own(pair: Pair) -> None:
    """Gains [H * D]; a bias is all heads'."""
    x, gain, bias = pair.rounded(pair.normal(2, 7, 3, 10) + np.float32(0.5)), pair.weight(30), pair.weight(10)
    pair.same("rms_norm", lambda ops, x, g: (ops.rms_norm(x, g, 1e-5), ops.rms_norm(x, g, 1e-5, 1.0)), x, gain)
    pair.same("layer_norm", lambda ops, x, g: ops.layer_norm(x, g, None, 1e-5), x, gain)
    pair.same("layer_norm", lambda ops, x, g, b: ops.layer_norm(x, g, b, 1e-5), x, gain, bias)


@case(shape=[(1, 1, 32), (2, 7, 33)], biased=[False, True])
def layer_norm(pair: Pair, shape: tuple[int, ...], biased: bool) -> None:
    x, gain, bias = pair.normal(*shape) + np.float32(0.5), pair.weight(shape[-1]), pair.weight(shape[-1])
    fn = lambda ops, x, g, b: ops.layer_norm(x, g, b if biased else None, 1e-5)  # noqa: E731
    pair.same("layer_norm", fn, pair.rounded(x), gain, bias)


KINDS = ["silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh", "clamp", "clamped_swish"]


@case(kind=KINDS)
def act(pair: Pair, kind: str) -> None:
    for x in (pair.normal(3, 7, scale=3.0), pair.rounded(np.linspace(-30, 30, 61, dtype=np.float32))):
        pair.same("act", lambda ops, x: ops.act(x, kind), x)


@case(kind=KINDS[:4])
def gated(pair: Pair, kind: str) -> None:
    for shape in ((1, 1, 33), (2, 7, 48)):
        x, y = pair.normal(*shape, scale=2.0), pair.normal(*shape)
        pair.same("gated", lambda ops, x, y: ops.gated(x, y, kind), x, y)


@case()
def unknown_activation(pair: Pair) -> None:
    x = pair.backend.zeros((1, 4))
    for call in (lambda: pair.backend.act(x, "sillu"), lambda: pair.backend.gated(x, x, "sillu")):
        try:
            call()
        except Unsupported:
            continue
        raise AssertionError("an unknown activation was accepted")


@case()
def softcap(pair: Pair) -> None:
    pair.same("softcap", lambda ops, x: ops.softcap(x, 5.0), pair.normal(3, 9, scale=10.0))


ROPES = {"whole": 16, "part": 8, "pair": 2}


@case(turned=ROPES, interleaved=[False, True], tokens=[1, 7])
def rope(pair: Pair, turned: str, interleaved: bool, tokens: int) -> None:
    step = Step(int32(0, 11), int32(tokens, tokens), int32(0, 1))
    x, f = pair.normal(2, tokens, 3, 16), freqs(ROPES[turned])
    pair.same("rope", lambda ops, x: ops.rope(x, step, f, interleaved), x)


@case(turned=[32, 12], interleaved=[False, True])
def rope_scaled_and_far(pair: Pair, turned: int, interleaved: bool) -> None:
    """The scale is for what turns; the other dimensions pass as they are."""
    step = Step(int32(2000, 0, 37), int32(2, 2, 2), int32(0, 1, 2))
    x, f = pair.normal(3, 2, 1, 32), freqs(turned)
    pair.same("rope", lambda ops, x: ops.rope(x, step, f, interleaved, 1.3), x)


@case()
def rope_is_relative(pair: Pair) -> None:
    """Scores depend on the distance alone: that is what the rotation is for."""
    q, k, f = pair.normal(1, 1, 1, 16), pair.normal(1, 1, 1, 16), freqs(16)

    def score(at: int, back: int) -> float:
        q_step, k_step = (Step(int32(p), int32(1), int32(0)) for p in (at, at - back))
        turned = pair.on(
            pair.backend,
            lambda ops, q, k: (ops.rope(q, q_step, f), ops.rope(k, k_step, f)),
            q, k,
        )  # fmt: skip
        return float((turned[0] * turned[1]).sum())

    size = float(np.linalg.norm(q) * np.linalg.norm(k))
    off = abs(score(3, 2) - score(9, 2)) / size
    assert off <= 4 * pair.tolerance("rope"), f"the same distance elsewhere gives another score: {off:.2g}"
    assert abs(score(3, 2) - score(3, -2)) > 0.05 * size, "turning forwards and backwards is the same"


@case()
def empty_step(pair: Pair) -> None:
    """No token at all in a row: nothing to compute, nothing to break."""
    step = Step(int32(0, 5), int32(0, 2), int32(0, 1))
    x, f = pair.normal(2, 2, 1, 8), freqs(8)
    got = pair.on(pair.backend, lambda ops, x: ops.rope(x, step, f), x)[0]
    want = pair.on(pair.reference, lambda ops, x: ops.rope(x, step, f), x)[0]
    pair.close("rope", got[1], want[1])
    assert np.isfinite(got).all(), "padding is not finite"


@case(tokens=[1, 7])
def embed_and_head_share_a_weight(pair: Pair, tokens: int) -> None:
    weight, ids = dense(pair.normal(11, 32)), pair.ids(11, 2, tokens)

    def tied(ops, w, ids):
        x = ops.embed(w, ids)
        return ops.linear(x, w), ops.embed(w, ids), ops.linear(x, w)

    pair.same("linear", tied, weight, ids)
