"""What a backend says a weight will take is what it takes, for every format."""

from __future__ import annotations

import numpy as np
import pytest

from ondevice import schemes
from ondevice.registry import create_backend, probe_backends
from ondevice.schemes import row
from ondevice.tensors import Affine, Blocks, Dense, Stack, Tensor, blank, dense

ROWS, COLUMNS = 40, 512  # rows that do not fill tiles of sixteen


def blocks(kind: str) -> Tensor:
    octets = np.zeros((ROWS, schemes.row_bytes(kind, COLUMNS)), np.uint8)
    return Tensor((ROWS, COLUMNS), Blocks(kind), {"weight": octets})


TENSORS = {kind: blocks(kind) for kind in schemes.LAYOUT}
TENSORS |= {
    f"affine {bits}, {group}": blank((3, ROWS, COLUMNS), Affine(bits, group, "float16"))
    for bits in schemes.AFFINE_BITS
    for group in (32, 128)
}
TENSORS |= {dtype: blank((ROWS, COLUMNS), Dense(dtype)) for dtype in ("float32", "float16", "bfloat16")}
TENSORS["a vector"] = dense(np.zeros(COLUMNS, np.float16))


def bytes_of(weight) -> int:
    """What the arrays inside a backend's weight take."""
    if hasattr(weight, "native"):
        return weight.numbers.nbytes if weight.native is None else weight.native.nbytes
    held = [*vars(weight).values(), *getattr(weight, "parts", ())]
    return sum(part.nbytes for part in held if hasattr(part, "nbytes"))


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("backend", ["cpu", "cuda", "mlx"])
def test_what_is_said_is_what_it_takes(backend, name):
    if not probe_backends()[backend].ready:
        pytest.skip(f"{backend} is not ready here")
    ops, tensor = create_backend(backend), TENSORS[name]
    took = bytes_of(ops.prepare(tensor))
    stays = backend == "cpu" and isinstance(tensor.format, Dense) and len(tensor.shape) > 1  # in its file
    assert ops.footprint(tensor) == ((0, tensor.nbytes) if stays else (took, 0))


@pytest.mark.parametrize("name", [name for name in TENSORS if "affine" in name or name == "MXFP4"])
def test_experts_that_are_read_one_by_one_can_be_read_again(name):
    tensor, ops = TENSORS[name], create_backend("cpu")
    one = row(tensor, 0) if len(tensor.shape) > 2 else tensor
    stack = Stack(3, lambda expert: one)
    assert ops.footprint(stack) == (0, 3 * bytes_of(ops.prepare(one))) and stack.nbytes == 3 * one.nbytes


@pytest.mark.parametrize("form", [Dense("float32"), Dense("bfloat16"), Affine(3, 64, "bfloat16")])
def test_a_blank_tensor_counts_like_a_real_one(form):
    values = np.ones((6, 128), np.float32)
    if isinstance(form, Affine):
        real = schemes.quantize_affine(values, form.bits, form.group_size, form.dtype)
    else:
        real = schemes.to_dense(dense(values), form.dtype)
    made = blank((6, 128), form)
    assert made.nbytes == real.nbytes and made.shape == real.shape and made.size == real.size
    assert {n: p.dtype for n, p in made.parts.items()} == {n: p.dtype for n, p in real.parts.items()}
