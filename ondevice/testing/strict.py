"""A backend that allows nothing but the contract: what runs on it runs on every backend.

Its arrays know `+`, `*`, `.shape` and `.reshape`, its weights nothing at all; arrays of two backends don't mix, host
arrays don't slip in where an array is asked for, and a step's numbers must be what the contract says. Whatever model
code does beyond that raises at the place where it is done.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, NoReturn

import numpy as np

from ..backends.base import Backend, Cache, Routing, Sampled, Step


class Forbidden(TypeError):
    """Model code did what the contract does not allow."""


class _Opaque:
    """Something of the backend's. Only `StrictBackend` looks inside."""

    __slots__ = ("_of", "_real")

    def __init__(self, of: StrictBackend, real: Any):
        object.__setattr__(self, "_of", of)
        object.__setattr__(self, "_real", real)

    def _refuse(self, what: str) -> NoReturn:
        raise Forbidden(f"model code may not use {what} of {type(self).__name__}: see backends/base.py")

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)  # protocols that Python looks for must find nothing, not an error
        self._refuse(f".{name}")

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        self._refuse(f".{name} =")

    def __bool__(self) -> NoReturn:
        self._refuse("the truth")

    def __eq__(self, other: object) -> NoReturn:
        self._refuse("==")

    __hash__ = object.__hash__


class StrictWeight(_Opaque):
    """What `prepare` returned."""

    __slots__ = ()


class StrictArray(_Opaque):
    """`a + b`, `a * b` (arrays of one backend, or a Python float), `.shape`, `.reshape(*shape)`."""

    __slots__ = ()
    __array_ufunc__ = None  # a host array on the left must not try either

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._real.shape)

    def reshape(self, *shape: int) -> StrictArray:
        if not all(type(n) is int for n in shape):
            raise Forbidden(f"reshape takes Python ints, not {shape}")
        return StrictArray(self._of, self._real.reshape(*shape))

    def _operand(self, other: Any) -> Any:
        if type(other) in (float, int):
            return other
        if type(other) is not StrictArray or other._of is not self._of:
            raise Forbidden(
                f"an array goes with arrays of its backend and Python floats, not with {type(other).__name__}"
            )
        return other._real

    def __add__(self, other: StrictArray | float) -> StrictArray:
        return StrictArray(self._of, self._real + self._operand(other))

    def __mul__(self, other: StrictArray | float) -> StrictArray:
        return StrictArray(self._of, self._real * self._operand(other))

    __radd__ = __add__
    __rmul__ = __mul__


class StrictRouting(Routing):
    """ids and gates, and nothing of what else a backend keeps there."""

    __slots__ = ("_real", "gates", "ids")

    def __init__(self, real: Routing, ids: StrictArray, gates: StrictArray):
        self._real, self.ids, self.gates = real, ids, gates


class StrictBackend(Backend):
    """`inner`, held to the contract. `calls` counts the operations by name."""

    def __init__(self, inner: Backend):
        self.inner = inner
        self.name, self.features, self.exact = inner.name, inner.features - {"burst"}, inner.exact
        self.asynchronous = inner.asynchronous
        self.calls: dict[str, int] = {}

    def _do(self, name: str, args: tuple, kwargs: dict) -> Any:
        self.calls[name] = self.calls.get(name, 0) + 1
        operation = getattr(self.inner, name)
        bound = inspect.signature(operation).bind(*args, **kwargs)
        result = operation(*(self._open(a) for a in bound.args), **{k: self._open(v) for k, v in bound.kwargs.items()})
        if name in HOST:
            return result
        return StrictWeight(self, result) if name in ("prepare", "quantized") else self._close(result)

    def _open(self, value: Any) -> Any:
        """What model code holds -> what the inner backend takes."""
        if isinstance(value, _Opaque):
            if value._of is not self:
                raise Forbidden("an array or weight of another backend")
            return value._real
        if isinstance(value, StrictRouting):
            return value._real
        if isinstance(value, Step):
            return _checked(value)
        if isinstance(value, dict):
            return {k: self._open(v) for k, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._open(v) for v in value)
        if callable(value):
            return self._turned(value)
        return value

    def _close(self, value: Any) -> Any:
        """What the inner backend returned -> what model code may hold."""
        if isinstance(value, Sampled):
            return replace(value, **{k: self._close(v) for k, v in vars(value).items()})
        if isinstance(value, Routing):
            return StrictRouting(value, self._close(value.ids), self._close(value.gates))
        if isinstance(value, dict):
            return {k: self._close(v) for k, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._close(v) for v in value)
        if hasattr(value, "reshape"):
            return StrictArray(self, value)
        if callable(value):
            return lambda *args: self._close(value(*(self._open(a) for a in args)))
        return value

    def _turned(self, fn: Callable) -> Callable:
        """Model code's function as the inner backend calls it: with its own arrays, for its own."""
        return lambda *args: self._open(fn(*(self._close(a) for a in args)))


HOST = ("info", "numpy", "new_cache", "release", "sync")  # what these return is the host's


def _checked(step: Step) -> Step:
    rows = len(step.starts)
    for name in ("starts", "lengths", "slots"):
        numbers = getattr(step, name)
        if not (isinstance(numbers, np.ndarray) and numbers.dtype == np.int32 and numbers.shape == (rows,)):
            raise Forbidden(f"step.{name} must be a host int32 array [{rows}]")
    if step.cache is not None and not isinstance(step.cache, Cache):
        raise Forbidden(f"step.cache is a {type(step.cache).__name__}")
    return step


def _method(name: str, contract: Callable) -> Callable:
    @wraps(contract)
    def method(self: StrictBackend, *args: Any, **kwargs: Any) -> Any:
        return self._do(name, args, kwargs)

    return method


for _name, _contract in inspect.getmembers(Backend, inspect.isfunction):
    if not _name.startswith("_"):
        setattr(StrictBackend, _name, _method(_name, _contract))
StrictBackend.__abstractmethods__ = frozenset()
