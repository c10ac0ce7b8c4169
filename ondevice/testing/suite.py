"""The conformance suite's machinery: cases, the pair of backends that each runs on, and how close is close enough.

It needs no pytest: `run(backend)` gives back what failed. `conformance.py` is its face for pytest.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..backends.base import Backend
from ..backends.reference import create as create_reference
from ..tensors import Tensor, bf16_to_f32, dense, f32_to_bf16

# How far a result may be from the reference's, as a share of (its own size + the root mean square of all): by the
# dtype of the activations, then by operation; "" is for all others. bfloat16 has 8 bits, float16 11: one rounding
# costs 2^-9 and 2^-12, and an operation rounds its inputs, its result and sometimes something between.
TOLERANCE = {
    "float64": {"": 1e-5},
    "float32": {"": 1e-5, "rope": 3e-4, "chain": 1e-4, "gradient": 1e-4},
    "float16": {"": 4e-3, "attention": 1e-2, "rope": 4e-3, "chain": 2e-2, "gradient": 3e-2},
    "bfloat16": {"": 2e-2, "attention": 5e-2, "rope": 2e-2, "chain": 8e-2, "gradient": 1e-1},
}
# Activations rounded to int8 by groups, as a backend may do in front of quantized weights unless it is exact.
INT8_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Case:
    """One check. `check(pair, **arguments)` raises AssertionError; `feature` is the word a backend must declare."""

    name: str
    check: Callable[..., None] = field(repr=False)
    arguments: dict[str, Any] = field(repr=False)
    feature: str | None = None

    def __call__(self, backend: Backend, reference: Backend | None = None) -> None:
        pair = Pair(backend, reference or create_reference(), seed=zlib.crc32(self.name.encode()))
        self.check(pair, **self.arguments)

    def serves(self, backend: Backend) -> bool:
        return self.feature is None or self.feature in backend.features


CASES: list[Case] = []


def case(feature: str | None = None, **parameters: Iterable) -> Callable:
    """Registers a function as one case for each combination of its parameters' values."""

    def register(check: Callable[..., None]) -> Callable[..., None]:
        for values in itertools.product(*parameters.values()):
            arguments = dict(zip(parameters, values, strict=True))
            label = "-".join(f"{k}={_label(v)}" for k, v in arguments.items())
            name = f"{check.__module__.rsplit('.', 1)[-1]}.{check.__name__}" + (f"[{label}]" if label else "")
            CASES.append(Case(name, check, arguments, feature))
        return check

    return register


def _label(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(getattr(value, "name", value))


@dataclass(frozen=True)
class Failure:
    case: Case
    error: Exception

    def __str__(self) -> str:
        return f"{self.case.name}: {type(self.error).__name__}: {self.error}"


def run(backend: Backend, select: Callable[[Case], bool] = lambda case: True, first: bool = False) -> list[Failure]:
    """Runs all cases that serve the backend's features; returns the failures (the first alone, if so wished)."""
    from . import cases  # noqa: F401  (registers them)

    reference, failures = create_reference(), []
    for case in CASES:
        if not (case.serves(backend) and select(case)):
            continue
        try:
            case(backend, reference)
        except Exception as error:  # a broken backend may fail in any way
            failures.append(Failure(case, error))
            if first:
                break
    return failures


class Pair:
    """A backend, the reference, and random inputs that both can represent."""

    def __init__(self, backend: Backend, reference: Backend, seed: int):
        self.backend, self.reference = backend, reference
        self.dtype = backend.info().dtype
        self.random = np.random.default_rng(seed)

    # ---- inputs

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        """Normal numbers, rounded to what the backend's activations can hold."""
        return self.rounded(self.random.standard_normal(shape, dtype=np.float32) * np.float32(scale))

    def rounded(self, values: np.ndarray) -> np.ndarray:
        if self.dtype == "bfloat16":
            return bf16_to_f32(f32_to_bf16(values))
        return values.astype(np.float16).astype(np.float32) if self.dtype == "float16" else values

    def weight(self, *shape: int, scale: float | None = None) -> Tensor:
        """A dense weight; matrices scaled so that their products keep their inputs' size."""
        return dense(self.normal(*shape, scale=scale or (shape[-1] ** -0.5 if len(shape) > 1 else 1.0)))

    def ids(self, below: int, *shape: int) -> np.ndarray:
        return self.random.integers(0, below, shape).astype(np.int32)

    # ---- comparing

    def same(self, operation: str, fn: Callable, *inputs: Any) -> None:
        """fn(ops, *inputs) -> array(s) gives the same on both. ndarrays become arrays, Tensors weights."""
        got, want = (self.on(ops, fn, *inputs) for ops in (self.backend, self.reference))
        assert len(got) == len(want), f"{operation}: {len(got)} results instead of {len(want)}"
        for g, w in zip(got, want, strict=True):
            self.close(operation, g, w)

    def on(self, ops: Backend, fn: Callable, *inputs: Any) -> list[np.ndarray]:
        """fn's results on one backend, on the host."""
        result = fn(ops, *(given(ops, i) for i in inputs))
        return [ops.numpy(a) for a in (result if isinstance(result, (tuple, list)) else [result])]

    def close(
        self, operation: str, got: np.ndarray, want: np.ndarray, tolerance: float | None = None,
        size: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Raises AssertionError unless got is want, as closely as the operation asks for. size: of what was summed up,
        where that may cancel out and the root mean square of `want` says too little."""
        got, want = np.asarray(got), np.asarray(want)
        assert got.shape == want.shape, f"{operation}: shape {got.shape} instead of {want.shape}"
        if want.dtype.kind in "iu":
            assert got.dtype == np.int32, f"{operation}: {got.dtype} instead of int32"
            assert np.array_equal(got, want), f"{operation}: {got.tolist()} instead of {want.tolist()}"
            return
        if want.size == 0:
            return
        allowed = self.tolerance(operation) if tolerance is None else tolerance
        assert np.isfinite(got).all(), f"{operation}: not finite"
        size = np.sqrt(np.mean(want * want)) if size is None else size
        error = np.abs(got - want) / (np.abs(want) + size + 1e-30)
        worst = np.unravel_index(int(np.argmax(error)), error.shape)
        assert error[worst] <= allowed, (
            f"{operation}: {got[worst]:.6g} instead of {want[worst]:.6g} at {tuple(map(int, worst))} of {got.shape}: "
            f"error {error[worst]:.2g}, {allowed:.2g} allowed"
        )

    def alike(
        self, operation: str, got: Sequence[np.ndarray], want: Sequence[np.ndarray], tolerance: float | None = None
    ) -> None:
        """The results of many steps of a long computation. Their error counts as a whole, by its root mean square: one
        rounding early on may be blown up at one place, which is nobody's fault."""
        shapes = [g.shape for g in got], [w.shape for w in want]
        assert shapes[0] == shapes[1], f"{operation}: shapes {shapes[0]} instead of {shapes[1]}"
        flat_got, flat_want = (np.concatenate([a.ravel() for a in arrays]) for arrays in (got, want))
        allowed = self.tolerance(operation) if tolerance is None else tolerance
        error = np.sqrt(np.mean((flat_got - flat_want) ** 2) / np.mean(flat_want**2))
        assert error <= allowed, f"{operation}: error {error:.2g} over {len(got)} results, {allowed:.2g} allowed"

    def tolerance(self, operation: str) -> float:
        if operation == "quantized" and not self.backend.exact:
            return INT8_TOLERANCE
        row = TOLERANCE[self.dtype]
        return row.get(operation, row[""])


def given(ops: Backend, value: Any) -> Any:
    """A host value as one backend takes it."""
    if isinstance(value, Tensor):
        return ops.prepare(value)
    if isinstance(value, np.ndarray):
        return ops.array(value)
    if isinstance(value, dict):
        return {name: given(ops, v) for name, v in value.items()}
    return value


def equal(what: str, got: Any, want: Any) -> None:
    """Raises AssertionError unless they are equal to the last bit (arrays: shape and numbers)."""
    same = np.array_equal(got, want) if isinstance(got, np.ndarray) else got == want
    assert same, f"{what}: {got} instead of {want}"


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def freqs(dims: int, base: float = 10000.0) -> np.ndarray:
    """Rotary frequencies [dims / 2] float32."""
    return (base ** (-np.arange(0, dims, 2) / dims)).astype(np.float32)


def concatenated(pieces: Sequence[np.ndarray], axis: int = 1) -> np.ndarray:
    return np.concatenate(list(pieces), axis=axis)
