"""Weight formats against the packages that define them: gguf for block types, MLX for the affine convention."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from ondevice import schemes
from ondevice.errors import Unsupported
from ondevice.tensors import Affine, Blocks, Dense, Tensor, dense, f32_to_bf16, floats, store
from tests.files.small_models import KINDS, random_blocks

LEGACY = tuple(schemes.LEGACY_BITS)


def blocks(kind: str, rows: int = 3, columns: int = 512) -> Tensor:
    return Tensor((rows, columns), Blocks(kind), {"weight": random_blocks(kind, rows, columns)})


def expected(tensor: Tensor) -> np.ndarray:
    return gguf.dequantize(tensor.parts["weight"], gguf.GGMLQuantizationType[tensor.format.kind])


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_ggml_s(kind):
    sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert sizes == (schemes.block_size(kind), schemes.LAYOUT[kind].itemsize)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_decode_exactly(kind):
    tensor = blocks(kind)
    assert np.array_equal(schemes.to_float(tensor), expected(tensor))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_the_same_numbers(kind):
    tensor = blocks(kind)
    codes, scales, biases, group = schemes.k_parts(tensor)
    assert codes.dtype == np.uint8 and scales.shape == biases.shape == (3, 512 // group)
    spread = np.repeat(scales, group, axis=-1) * codes + np.repeat(biases, group, axis=-1)
    assert np.array_equal(spread, schemes.to_float(tensor))
    assert group == (16 if kind in ("Q2_K", "Q3_K", "Q6_K") else 32)


@pytest.mark.parametrize("kind", LEGACY)
def test_legacy_types_keep_codes_and_values(kind):
    tensor = blocks(kind)
    affine = schemes.to_affine(tensor)
    assert affine.format == Affine(schemes.LEGACY_BITS[kind], 32, "float16")
    assert np.array_equal(schemes.to_float(affine), expected(tensor))
    assert np.array_equal(schemes.parts(affine).codes, schemes.k_parts(tensor).codes)


@pytest.mark.parametrize(("kind", "d"), [("Q4_0", 9000), ("Q5_0", 4500), ("Q8_0", 600)])
def test_a_bias_beyond_float16_widens_scales(kind, d):
    tensor = blocks(kind)
    tensor.parts["weight"].view(schemes.LAYOUT[kind])["d"][1, 2] = d
    affine = schemes.to_affine(tensor)
    assert affine.format.dtype == "float32"
    assert np.array_equal(schemes.to_float(affine), expected(tensor))


@pytest.mark.parametrize("kind", ["Q5_1", "Q6_K"])
def test_large_tensors_go_in_pieces_with_the_same_result(kind, monkeypatch):
    tensor = blocks(kind, rows=7)
    whole = schemes.to_dense(tensor, "bfloat16"), schemes.to_affine(tensor) if kind == "Q5_1" else None
    monkeypatch.setattr(schemes, "CHUNK", 1024)
    pieces = schemes.to_dense(tensor, "bfloat16"), schemes.to_affine(tensor) if kind == "Q5_1" else None
    for one, other in zip(whole, pieces, strict=True):
        assert one is None or all(np.array_equal(one.parts[name], part) for name, part in other.parts.items())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_to_dense_rounds_to_nearest(kind, dtype):
    tensor = blocks(kind)
    made = schemes.to_dense(tensor, dtype)
    assert made.format == Dense(dtype) and made.shape == tensor.shape
    rounded = floats(store(expected(tensor), dtype), dtype)  # as numbers: a zero's sign is free
    assert np.array_equal(schemes.to_float(made), rounded)
    assert schemes.to_dense(made, dtype) is made


def test_k_quants_have_no_exact_affine_form():
    with pytest.raises(Unsupported, match="Q4_K"):
        schemes.to_affine(blocks("Q4_K"))


def test_other_block_types_are_refused():
    with pytest.raises(Unsupported, match="IQ4_XS"):
        schemes.to_float(Tensor((1, 256), Blocks("IQ4_XS"), {"weight": np.zeros((1, 136), np.uint8)}))


@pytest.mark.parametrize("bits", schemes.AFFINE_BITS)
def test_pack_and_unpack_are_inverse(bits):
    codes = np.random.default_rng(0).integers(0, 1 << bits, (2, 3, 96), dtype=np.uint8)
    packed = schemes.pack(codes, bits)
    assert packed.dtype == np.uint32 and packed.shape == (2, 3, 96 * bits // 32)
    assert np.array_equal(schemes.unpack(packed, bits, 96), codes)


def test_rows_that_do_not_fill_words_are_refused():
    with pytest.raises(Unsupported, match="whole 32-bit words"):
        schemes.pack(np.zeros((2, 8), np.uint8), 3)
    with pytest.raises(Unsupported, match="7 bits"):
        schemes.pack(np.zeros((2, 32), np.uint8), 7)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", schemes.AFFINE_BITS)
def test_quantize_is_mlx_s_bit_for_bit(bits, group, dtype):
    mx = pytest.importorskip("mlx.core")
    values = np.random.default_rng(bits).normal(size=(7, 256)).astype(np.float32)
    values[3] = 0
    values[4] = np.abs(values[4])
    values[5, :128] = -2.5
    values = floats(store(values, dtype), dtype)
    theirs = mx.quantize(mx.array(values).astype(getattr(mx, dtype)), group, bits)
    weight, scales, biases = theirs[0], *(part.astype(mx.float32) for part in theirs[1:])
    ours = schemes.quantize_affine(values, bits, group, dtype)
    assert np.array_equal(ours.parts["weight"], np.array(weight))
    assert np.array_equal(floats(ours.parts["scales"], dtype), np.array(scales))
    assert np.array_equal(floats(ours.parts["biases"], dtype), np.array(biases))
    assert np.array_equal(schemes.to_float(ours), np.array(mx.dequantize(weight, scales, biases, group, bits)))


def test_quantize_refuses_groups_that_do_not_fit():
    with pytest.raises(Unsupported, match="groups of 64"):
        schemes.quantize_affine(np.zeros((2, 96), np.float32), 4, 64, "float16")


EVERY = [
    dense(np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)),
    Tensor((6, 64), Dense("bfloat16"), {"weight": f32_to_bf16(np.random.default_rng(0).normal(size=(6, 64)))}),
    schemes.quantize_affine(np.random.default_rng(0).normal(size=(6, 64)), 3, 32, "float16"),
    blocks("Q4_0", 6, 64),
    blocks("Q6_K", 6, 256),
]


WIDE = [
    (dense(np.arange(1536, dtype=np.float32).reshape(6, 256)), 1),
    (schemes.quantize_affine(np.random.default_rng(0).normal(size=(6, 256)), 3, 64, "float16"), 64),
    (blocks("Q4_0", 6, 256), 32),
    (blocks("Q4_K", 6, 512), 256),
]


@pytest.mark.parametrize(("tensor", "span"), WIDE)
def test_columns_move_with_their_groups(tensor, span):
    columns = tensor.shape[1]
    whole = np.random.default_rng(1).permutation(columns // span)[:, None] * span + np.arange(span)
    parted = np.random.default_rng(1).permutation(columns)
    moved = schemes.take_columns(tensor, whole.ravel())
    assert moved.format == tensor.format
    assert np.array_equal(schemes.to_float(moved), schemes.to_float(tensor)[:, whole.ravel()])
    moved = schemes.take_columns(tensor, parted)
    assert moved.format == (tensor.format if span == 1 else Dense("float32"))
    assert np.array_equal(schemes.to_float(moved), schemes.to_float(tensor)[:, parted])


@pytest.mark.parametrize("tensor", EVERY, ids=lambda tensor: schemes.label(tensor.format))
def test_rows_move_in_every_format(tensor):
    whole, order = schemes.to_float(tensor), [4, 0, 0, 5]
    taken = schemes.take_rows(tensor, order)
    assert taken.shape == (4, tensor.shape[1]) and taken.format == tensor.format
    assert np.array_equal(schemes.to_float(taken), whole[order])
    assert np.array_equal(schemes.rows(tensor, [[1, 2], [3, 1]]), whole[[[1, 2], [3, 1]]])
    stacked = schemes.stack([tensor, taken := schemes.take_rows(tensor, [5, 4, 3, 2, 1, 0])])
    assert np.array_equal(schemes.to_float(schemes.row(stacked, 1)), schemes.to_float(taken))


@pytest.mark.parametrize("tensor", EVERY, ids=lambda tensor: schemes.label(tensor.format))
def test_experts_stack_in_every_format(tensor):
    both = schemes.stack([tensor, schemes.take_rows(tensor, range(5, -1, -1))])
    whole = schemes.to_float(tensor)
    assert both.shape == (2, *tensor.shape) and both.format == tensor.format
    assert np.array_equal(schemes.to_float(both), np.stack([whole, whole[::-1]]))


def test_different_formats_do_not_stack():
    with pytest.raises(Unsupported, match="differ"):
        schemes.stack([EVERY[0], EVERY[1]])
