"""Weights in every format: a linear map, an embedding and an expert over W are those over W's numbers.

The numbers come from `schemes.to_float`, so these cases hold without a reference for quantized products.
"""

from __future__ import annotations

import numpy as np

from ... import schemes
from ...backends.base import RouteRule, Routing
from ...tensors import Affine, Blocks, Dense, Tensor, dense, store
from ..suite import Pair, case

TOKENS = (1, 2, 3, 9, 33)  # one by one, a few, many: kernels take different roads


class Format:
    """A weight format by the name it has in a case's name, and random tensors of it."""

    def __init__(self, form: Dense | Affine | Blocks):
        self.form = form
        self.name = schemes.label(form).replace(" (groups of ", "x").rstrip(")")

    @property
    def columns(self) -> int:
        """An odd number of groups or blocks."""
        if isinstance(self.form, Dense):
            return 37
        return 3 * (self.form.group_size if isinstance(self.form, Affine) else schemes.block_size(self.form.kind))

    def tensor(self, random: np.random.Generator, *rows: int, columns: int | None = None) -> Tensor:
        """[*rows, columns], numbers of about the size 1 / sqrt(columns)."""
        columns = columns or self.columns
        shape, size = (*rows, columns), np.float32(columns**-0.5)
        if isinstance(self.form, Dense):
            return Tensor(
                shape, self.form, {"weight": store(random.standard_normal(shape, np.float32) * size, self.form.dtype)}
            )
        if isinstance(self.form, Affine):
            return self._affine(random, shape, size)
        return Tensor(shape, self.form, {"weight": random_blocks(random, self.form.kind, shape, size)})

    def _affine(self, random: np.random.Generator, shape: tuple[int, ...], size: np.float32) -> Tensor:
        """Every code anywhere, scales of either sign."""
        form, groups = self.form, (*shape[:-1], shape[-1] // self.form.group_size)
        codes = random.integers(0, 1 << form.bits, shape).astype(np.uint8)
        scales = random.standard_normal(groups, np.float32) * (size / (1 << form.bits - 1))
        biases = -scales * np.float32(1 << form.bits - 1) + random.standard_normal(groups, np.float32) * size
        stored = {"scales": store(scales, form.dtype), "biases": store(biases, form.dtype)}
        return Tensor(shape, form, {"weight": schemes.pack(codes, form.bits), **stored})


def random_blocks(random: np.random.Generator, kind: str, shape: tuple[int, ...], size: float = 1.0) -> np.ndarray:
    """Blocks with every bit random, but scales such that the numbers are about `size`: uint8 [..., bytes a row]."""
    octets = random.integers(0, 256, (*shape[:-1], schemes.row_bytes(kind, shape[-1])), dtype=np.uint8)
    blocks = octets.view(schemes.LAYOUT[kind])
    if kind == "MXFP4":
        blocks["e"] = 126 + random.integers(0, 2, blocks.shape, dtype=np.uint8)  # numbers of up to 3 and 6
    if kind == "FP8":
        blocks["qs"] &= 0xBF  # numbers of up to 1.875: half of the exponents, and no NaN
    for name in {"d", "m", "dmin"} & set(blocks.dtype.names):
        blocks[name] = random.standard_normal(blocks.shape).astype(np.float16)
    spread = float(np.std(schemes.to_float(Tensor(shape, Blocks(kind), {"weight": octets}))))
    for name in {"d", "m", "dmin"} & set(blocks.dtype.names):
        blocks[name] = blocks[name] * np.float16(size / spread)
    return octets


SCALES = ("float16", "bfloat16", "float32")
DENSE = [Format(Dense(dtype)) for dtype in SCALES]
AFFINE = [
    Format(Affine(bits, group, SCALES[(i + j) % 3]))
    for i, bits in enumerate(schemes.AFFINE_BITS)
    for j, group in enumerate((32, 64, 128))
]
BLOCKS = [Format(Blocks(kind)) for kind in schemes.LAYOUT]
QUANTIZED = [*AFFINE, *BLOCKS]
SOME = [DENSE[1], AFFINE[7], BLOCKS[4], BLOCKS[8]]


def kind_of(form: Format) -> str:
    """The operation, for its tolerance."""
    return "linear" if isinstance(form.form, Dense) else "quantized"


def held(pair: Pair, form: Format) -> float | None:
    """The tolerance for numbers as a backend holds them: floats of eight bits times their scales may become bfloat16,
    whose steps are 2^-7 of a number at most, unless the backend is exact. None: as the operation's."""
    rounded = form.form == schemes.FP8 and not pair.backend.exact and pair.dtype == "float32"
    return 2**-8 if rounded else None


def is_product(
    pair: Pair, form: Format, got: np.ndarray, x: np.ndarray, w: np.ndarray, b: np.ndarray | float = 0.0
) -> None:
    """got is x . w^T + b: x [..., I], w [O, I]. A sum may cancel out; errors are measured by what went into it."""
    pair.close(kind_of(form), got, x @ w.T + b, size=np.sqrt((x * x) @ (w * w).T))


@case(form=[*DENSE, *QUANTIZED])
def dequantize(pair: Pair, form: Format) -> None:
    tensor = form.tensor(pair.random, 5)
    got = pair.on(pair.backend, lambda ops, w: ops.dequantize(w), tensor)[0]
    pair.close("dequantize", got, schemes.to_float(tensor), held(pair, form))


@case(form=[*DENSE, *QUANTIZED])
def linear(pair: Pair, form: Format) -> None:
    for outputs in (1, 33):
        tensor, bias = form.tensor(pair.random, outputs), pair.weight(outputs)
        numbers = schemes.to_float(tensor)
        for tokens in TOKENS:
            x = pair.normal(tokens, form.columns)
            y, with_bias = pair.on(
                pair.backend, lambda ops, x, w, b: (ops.linear(x, w), ops.linear(x, w, b)), x, tensor, bias
            )
            is_product(pair, form, y, x, numbers)
            is_product(pair, form, with_bias, x, numbers, bias.parts["weight"])


@case(form=SOME)
def linear_of_many_tiles(pair: Pair, form: Format) -> None:
    """More rows, columns and tokens than any tile of a kernel, and none of them round."""
    columns = (
        form.columns * 3 if isinstance(form.form, Blocks) else 9 * 128 + (0 if isinstance(form.form, Affine) else 5)
    )
    tensor, x = form.tensor(pair.random, 131, columns=columns), pair.normal(77, columns)
    got = pair.on(pair.backend, lambda ops, x, w: ops.linear(x, w), x, tensor)[0]
    is_product(pair, form, got, x, schemes.to_float(tensor))


@case(form=[*DENSE, *QUANTIZED])
def embed(pair: Pair, form: Format) -> None:
    tensor, ids = form.tensor(pair.random, 11), pair.ids(11, 2, 7)
    got = pair.on(pair.backend, lambda ops, w, ids: ops.embed(w, ids), tensor, ids)[0]
    pair.close("embed", got, schemes.to_float(tensor)[ids], held(pair, form))


@case(form=SOME)
def linear_keeps_leading_axes(pair: Pair, form: Format) -> None:
    tensor, x = form.tensor(pair.random, 5), pair.normal(2, 3, form.columns)
    got = pair.on(pair.backend, lambda ops, x, w: ops.linear(x, w), x, tensor)[0]
    is_product(pair, form, got, x, schemes.to_float(tensor))


@case(form=SOME)
def one_row_alone(pair: Pair, form: Format) -> None:
    """What a token gives does not depend on its neighbours, whichever road they take."""
    tensor, x = form.tensor(pair.random, 48), pair.normal(33, form.columns)
    many = pair.on(pair.backend, lambda ops, x, w: ops.linear(x, w), x, tensor)[0]
    for i in (0, 17, 32):
        alone = pair.on(pair.backend, lambda ops, x, w: ops.linear(x, w), x[i : i + 1], tensor)[0]
        pair.close(kind_of(form), alone[0], many[i])


@case(shape=[(1, 1), (3, 1), (64, 576), (257, 130)])
def linear_of_odd_shapes(pair: Pair, shape: tuple[int, int]) -> None:
    weight = pair.weight(*shape)
    for tokens in (1, 5):
        pair.same("linear", lambda ops, x, w: ops.linear(x, w), pair.normal(tokens, shape[1]), weight)


@case()
def linear_with_arrays(pair: Pair) -> None:
    """Where an operation takes a weight, an array does as well: that is how trainables come in."""
    x, w, b = pair.normal(2, 3, 16), pair.normal(5, 16, scale=0.25), pair.normal(5)
    pair.same("linear", lambda ops, x, w, b: (ops.linear(x, w), ops.linear(x, w, b)), x, w, b)
    pair.same("embed", lambda ops, w, ids: ops.embed(w, ids), w, pair.ids(5, 1, 3))


@case(form=SOME)
def weights_as_files_hold_them(pair: Pair, form: Format) -> None:
    """Read-only, and at an odd address: a view of somebody's memory map."""
    tensor, x = form.tensor(pair.random, 9), pair.normal(3, form.columns)
    mapped = Tensor(tensor.shape, tensor.format, {name: odd_view(part) for name, part in tensor.parts.items()})
    got = pair.on(pair.backend, lambda ops, x, w: ops.linear(x, w), x, mapped)[0]
    is_product(pair, form, got, x, schemes.to_float(tensor))
    assert all(np.array_equal(mapped.parts[n], part) for n, part in tensor.parts.items()), "the tensor was written to"


def odd_view(part: np.ndarray) -> np.ndarray:
    """The same numbers, read-only, two bytes past an aligned address (dtypes of a byte: one)."""
    shift = min(2, part.itemsize)
    store = np.frombuffer(bytes(shift) + part.tobytes(), np.uint8)
    return store[shift:].view(part.dtype).reshape(part.shape)


@case("experts", form=[*SOME, AFFINE[0], AFFINE[5], BLOCKS[1]])
def experts(pair: Pair, form: Format) -> None:
    """One [E, O, I] weight, quantized or not, is E maps."""
    tensor = form.tensor(pair.random, 5, 17)
    numbers = schemes.to_float(tensor)
    for tokens in (1, 3, 40):
        x, logits = pair.normal(tokens, form.columns), pair.normal(tokens, 5)

        def chosen(ops, x, w, logits):
            routing: Routing = ops.route(logits, 2, RouteRule())
            return ops.expert_linear(x, w, routing), routing.ids

        y, ids = pair.on(pair.backend, chosen, x, tensor, logits)
        for n, j in np.ndindex(ids.shape):
            is_product(pair, form, y[n, j], x[n], numbers[ids[n, j]])


@case(form=SOME)
def stacked_weights_dequantize(pair: Pair, form: Format) -> None:
    tensor = form.tensor(pair.random, 3, 5)
    got = pair.on(pair.backend, lambda ops, w: ops.dequantize(w), tensor)[0]
    pair.close("dequantize", got, schemes.to_float(tensor))


@case()
def two_weights_of_one_tensor(pair: Pair) -> None:
    """Releasing one leaves the other."""
    tensor, x = dense(pair.normal(4, 8)), pair.normal(2, 8)
    first, second = pair.backend.prepare(tensor), pair.backend.prepare(tensor)
    pair.backend.release(first)
    got = pair.backend.numpy(pair.backend.linear(pair.backend.array(x), second))
    pair.close("linear", got, x @ tensor.parts["weight"].T)
