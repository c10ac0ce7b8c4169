"""Products over packed weights in Triton, for a few tokens: codes are read once and never written out as numbers.

Many tokens go the other way (`weights.PackedWeight`): unpacked piece by piece, then torch's own product, whose tensor
cores outweigh the writing. Where Triton is missing, few tokens do as well.
"""

from __future__ import annotations

import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MOST_TOKENS = 4  # each reads the weight again, from the second on mostly out of the cache
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: kernels run on the CPU, for tests
ROWS = 8  # outputs a program
COLUMNS = 512  # inputs it takes at a time


def serves(x: torch.Tensor) -> bool:
    """Is there a kernel for x [..., I]?"""
    return triton is not None and (x.is_cuda or INTERPRETED) and 0 < x.numel() <= MOST_TOKENS * x.shape[-1]


if triton is not None:

    @triton.jit
    def _codes(words, at, inside, bits: tl.constexpr):
        """Codes number `at` of packed rows; one that crosses a word's border takes its high bits from the next."""
        first = at * bits // 32
        shift = at * bits % 32
        code = tl.load(words + first, mask=inside, other=0).to(tl.uint32, bitcast=True) >> shift
        if 32 % bits != 0:
            crosses = shift + bits > 32
            rest = tl.load(words + first + 1, mask=inside & crosses, other=0).to(tl.uint32, bitcast=True)
            code = tl.where(crosses, code | (rest << ((32 - shift) % 32)), code)
        return code & ((1 << bits) - 1)

    @triton.jit
    def _linear(
        x, codes, scales, biases, y, inputs, outputs, words, groups,
        bits: tl.constexpr, group: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
    ):  # fmt: skip
        """Program (i, t): outputs i * rows … of token t. Sums in float32."""
        row = tl.program_id(0) * rows + tl.arange(0, rows)
        token = tl.program_id(1)
        real = (row < outputs)[:, None]
        total = tl.zeros((rows, columns), tl.float32)
        for start in range(0, inputs, columns):
            at = (start + tl.arange(0, columns))[None, :]
            inside = real & (at < inputs)
            code = _codes(codes + row[:, None].to(tl.int64) * words, at, inside, bits).to(tl.float32)
            where = row[:, None].to(tl.int64) * groups + at // group
            scale = tl.load(scales + where, mask=inside, other=0).to(tl.float32)
            bias = tl.load(biases + where, mask=inside, other=0).to(tl.float32)
            value = tl.load(x + token * inputs + at, mask=at < inputs, other=0).to(tl.float32)
            total += (code * scale + bias) * value
        tl.store(y + token * outputs + row, tl.sum(total, axis=1).to(y.dtype.element_ty), mask=row < outputs)


def linear(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, bits: int, group_size: int
) -> torch.Tensor:
    """x [..., I] over codes [O, I * bits / 32] int32, scales and biases [O, I / group] -> [..., O]"""
    (outputs, words), (groups, inputs) = codes.shape, (scales.shape[1], x.shape[-1])
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    grid = triton.cdiv(outputs, ROWS), x.numel() // inputs
    _linear[grid](
        x, codes.contiguous(), scales.contiguous(), biases.contiguous(), y, inputs, outputs, words, groups,
        bits, group_size, ROWS, COLUMNS,
    )  # fmt: skip
    return y
