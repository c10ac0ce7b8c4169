"""Weights as the native kernels read them: dense ones where the file has them, quantized ones repacked in tiles."""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from ... import schemes
from ...machine import free_bytes, memory_bytes, used_bytes
from ...tensors import STORAGE, Affine, Blocks, Dense, Stack, Tensor, dense, file_of
from ..base import Footprint
from . import _native

FLOATS = ("float32", "float16", "bfloat16")
BIASED = frozenset({"Q2_K", "Q4_K", "Q5_K"})  # the others' codes have a zero of their own (native/super_blocks.h)


class NativeWeight:
    """What `prepare` returns. Vectors are float32 `numbers`; matrices [O, I] and stacks [E, O, I] are `native`."""

    __slots__ = ("adapter", "native", "numbers", "quantized", "shape")

    def __init__(self, machine: _native.Machine, tensor: Tensor, exact: bool):
        self.shape = tensor.shape
        self.numbers: np.ndarray | None = None
        self.native: _native.Weight | None = None
        self.adapter: tuple[NativeWeight, float, _native.Adapter] | None = None  # see `adapter`
        self.quantized = tensor.quantized
        if len(tensor.shape) < 2:
            self.numbers = np.ascontiguousarray(schemes.to_float(tensor))
        elif isinstance(tensor, Stack):
            self.native = machine.stack(partial(_expert, machine, tensor, exact), tensor.shape[0])
        else:
            self.native = _matrix(machine, tensor, exact)

    @property
    def rows(self) -> int:
        return self.shape[-2]

    @property
    def columns(self) -> int:
        return self.shape[-1]


def fp8_dtype(exact: bool) -> str:
    """What floats of eight bits, which kernels do not read, become: in bfloat16 a scale's last bits are lost."""
    return "float32" if exact else "bfloat16"


def footprint(tensor: Tensor, exact: bool) -> Footprint:
    """Of a NativeWeight made of it: dense matrices stay in their file, tiles hold whole rows of sixteen. Experts that
    are fetched when they are needed can be fetched again: they are as good as mapped."""
    if isinstance(tensor, Stack):
        return Footprint(0, sum(_footprint(tensor, exact)))
    return _footprint(tensor, exact)


def _footprint(tensor: Tensor, exact: bool) -> Footprint:
    form, numbers = tensor.format, Footprint(4 * tensor.size)
    if len(tensor.shape) < 2:
        return numbers
    if form == schemes.FP8:
        return Footprint(STORAGE[fp8_dtype(exact)].itemsize * tensor.size)
    if isinstance(form, Dense):
        return Footprint(0, tensor.nbytes) if form.dtype in FLOATS else numbers
    if isinstance(form, Affine) and form.group_size % 32 == 0:
        bits, group, width, biased = form.bits, form.group_size, STORAGE[form.dtype].itemsize, True
    elif isinstance(form, Blocks) and form.kind in schemes.LEGACY_BITS:
        bits, group, width, biased = schemes.LEGACY_BITS[form.kind], 32, 2, form.kind.endswith("_1")
    elif isinstance(form, Blocks) and form.kind in schemes.CODE_BITS:
        bits, group, width, biased = schemes.CODE_BITS[form.kind], schemes.k_group(form.kind), 4, form.kind in BIASED
    else:
        return numbers
    experts, rows, columns = _stacked(tensor.shape)
    held = experts * -(-rows // 16) * 16 * columns
    return Footprint(held * bits // 8 + held // group * width * (2 if biased else 1))


def native_array(values: np.ndarray) -> _native.Weight:
    """An array (a trainable) in a weight's place."""
    return _native.dense(np.ascontiguousarray(values, np.float32), "float32", *values.shape[-2:], True)


def _expert(machine: _native.Machine, stack: Stack, exact: bool, index: int) -> _native.Weight:
    """One of a stack, when it is needed. Experts in memory of their own may take, together, what was used by no one a
    moment ago, but for an eighth of what there is; those not needed for longest go (backends/cpu/native/stack.h)."""
    residents, most = machine.residents, memory_bytes() if machine.residents.due else None
    if most is not None:
        free = free_bytes()
        room = min(most - used_bytes(), most if free is None else free) - most // 8
        residents.allow(max(0, residents.held + room))
    weight = _matrix(machine, stack.piece(index), exact, alone=True)
    if weight.nbytes:
        stack.done(index)
    return weight


def _matrix(machine: _native.Machine, tensor: Tensor, exact: bool, alone: bool = False) -> _native.Weight:
    """alone: in memory that is given back with it."""
    if tensor.format == schemes.FP8:
        tensor = schemes.to_dense(tensor, fp8_dtype(exact))
    return _dense(tensor) if isinstance(tensor.format, Dense) else _tiles(machine, tensor, alone)


def _dense(tensor: Tensor) -> _native.Weight:
    if tensor.format.dtype not in FLOATS:
        tensor = dense(schemes.to_float(tensor))
    numbers = np.ascontiguousarray(tensor.parts["weight"])
    return _native.dense(numbers, tensor.format.dtype, *tensor.shape[-2:], file_of(numbers) is None)


def _tiles(machine: _native.Machine, tensor: Tensor, alone: bool) -> _native.Weight:
    form, shape = tensor.format, _stacked(tensor.shape)
    if isinstance(form, Affine) and form.group_size % 32 == 0:
        codes, scales, biases = (_octets(tensor.parts[name]) for name in ("weight", "scales", "biases"))
        return machine.pack_affine(
            codes, form.bits, scales, biases, form.dtype, form.bits, form.group_size, 0.0, *shape, alone
        )
    if isinstance(form, Blocks) and form.kind in schemes.LEGACY_BITS:
        biased = form.kind.endswith("_1")
        return machine.pack_legacy(
            _octets(tensor.parts["weight"]), schemes.LEGACY_BITS[form.kind], biased, *shape, alone
        )
    if isinstance(form, Blocks) and form.kind in schemes.CODE_BITS:
        return machine.pack_blocks(_octets(tensor.parts["weight"]), form.kind, *shape, alone)
    return _dense(dense(schemes.to_float(tensor)))


def _stacked(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """[O, I] or [..., O, I] -> (experts, O, I)"""
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def _octets(part: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(part).view(np.uint8)


def numbers(machine: _native.Machine, weight: NativeWeight) -> np.ndarray:
    """float32, in the logical shape; not kept."""
    if weight.numbers is not None:
        return weight.numbers
    out, ids = np.empty(weight.shape, np.float32), np.arange(weight.rows, dtype=np.int32)
    plan, machine.plan = machine.plan, None  # now, even while a plan is being written
    for expert, part in enumerate(out.reshape(-1, *weight.shape[-2:])):
        machine.embed(weight.native, expert, ids, part)
    machine.plan = plan
    return out


def adapter(
    machine: _native.Machine, down: NativeWeight | np.ndarray, up: NativeWeight | np.ndarray, scale: float, exact: bool
) -> _native.Adapter:
    """scale * up [O, r] . down [r, I] as the kernels add it to a product; kept, of weights. Unless `exact`, in float16
    (half the bytes to read for a token), each half less a power of two that brings it near 1: what is lost is less than
    what int8 activations lose by a factor of some ten."""
    kept = up.adapter if isinstance(up, NativeWeight) else None
    if kept is not None and kept[0] is down and kept[1] == scale:
        return kept[2]
    a, b = (w if isinstance(w, np.ndarray) else numbers(machine, w) for w in (down, up))
    dtype, below = ("float32", (0, 0)) if exact else ("float16", (_magnitude(a), _magnitude(b)))
    narrow, wide = (np.ldexp(half, -n).astype(STORAGE[dtype]) for half, n in zip((a, b), below, strict=True))
    made = _native.Adapter(
        _native.dense(np.ascontiguousarray(narrow), dtype, *a.shape, True),
        _native.panels(_panels(wide), dtype, len(b)),
        float(np.ldexp(scale, sum(below))),
    )
    if isinstance(up, NativeWeight):
        up.adapter = down, scale, made
    return made


def _magnitude(numbers: np.ndarray) -> int:
    """The power of two next above all numbers."""
    return int(np.frexp(np.abs(numbers).max(initial=0.0))[1])


def _panels(matrix: np.ndarray) -> np.ndarray:
    """[O, I] -> [O / 16, I, 16], missing rows 0"""
    rows, columns = matrix.shape
    whole = np.zeros((-(-rows // 16) * 16, columns), matrix.dtype)
    whole[:rows] = matrix
    return np.ascontiguousarray(whole.reshape(-1, 16, columns).swapaxes(1, 2))
