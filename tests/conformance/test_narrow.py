"""Training in bfloat16 products with float32 sums, the default where a processor has them: the same code on kernels of
every instruction set, against exact gradients."""

from __future__ import annotations

import numpy as np
import pytest

from ondevice import schemes
from ondevice.tensors import dense

_native = pytest.importorskip("ondevice.backends.cpu._native", reason="the kernels are not compiled")

from ondevice.backends.cpu import create  # noqa: E402

ROUNDING = 2.0**-8  # of a number to bfloat16: half of its last place


def backend(kernels: str, narrow: bool):
    ops = create(exact=not narrow, kernels=kernels, threads=2)
    if narrow:
        ops.kernels.narrow = True
    return ops


def gradients(ops, weight, x, down, up) -> dict[str, np.ndarray]:
    """Of a loss that every number of a LoRA's result enters differently."""
    w = ops.prepare(weight)
    probe = np.random.default_rng(1).standard_normal((40, weight.shape[0])).astype(np.float32)

    def loss(p, probe):
        y = ops.adapted_linear(p["x"], w, None, p["down"], p["up"], 2.0)
        return ops.sum((y + ops.linear(p["x"], w)) * probe), y

    arrays = {name: ops.array(a) for name, a in {"x": x, "down": down, "up": up}.items()}
    (_, y), grads = ops.value_and_grad(loss)(arrays, ops.array(probe))
    return {"y": ops.numpy(y)} | {name: ops.numpy(g) for name, g in grads.items()}


@pytest.mark.parametrize("kernels", _native.variants())
@pytest.mark.parametrize("quantized", [False, True])
def test_gradients_differ_from_exact_ones_by_rounding(kernels: str, quantized: bool) -> None:
    draw = np.random.default_rng(0).standard_normal
    values = draw((48, 160), np.float32)
    weight = schemes.quantize_affine(values, 4, 32, "float32") if quantized else dense(values)
    x, down, up = draw((40, 160), np.float32), draw((5, 160), np.float32), draw((48, 5), np.float32)
    want = gradients(backend(kernels, narrow=False), weight, x, down, up)
    got = gradients(backend(kernels, narrow=True), weight, x, down, up)
    for name in want:
        error = np.abs(got[name] - want[name]).max() / np.sqrt(np.mean(want[name] ** 2))
        assert error < 8 * ROUNDING, name
    assert not np.array_equal(got["y"], want["y"])


def test_exact_is_float32_on_every_processor() -> None:
    assert not create(exact=True).kernels.narrow
    assert create(exact=True).info().details["training"] == "float32"
    assert create().kernels.narrow == create().machine.pairs
