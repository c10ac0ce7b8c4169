"""The contract on the processor: our own kernels where they were compiled, NumPy's where not."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...errors import BadOption
from ...registry import did_you_mean
from ...tensors import Tensor
from ..base import (
    FEATURES,
    A,
    Cache,
    Footprint,
    Info,
    LayerCache,
    Step,
    W,
    cache_dtype,
    positions,
    sharpness,
)
from ..reference import HostCache, NumpyKernels
from ..tape import Array, TapedBackend
from . import GET_KERNELS, NO_KERNELS, compiled
from .threads import default_threads

VARIANTS = ("avx512_bf16", "avx512", "avx2", "neon", "portable", "numpy")
MOST_THREADS = 256


def open_backend(exact: bool, threads: int | None, kernels: str | None) -> TapedBackend:
    """See `create` in this package."""
    kernels = kernels or os.environ.get("ONDEVICE_CPU_KERNELS") or None
    if kernels is not None and kernels not in VARIANTS:
        raise BadOption(f"There are no kernels named {kernels!r}.", did_you_mean(kernels, VARIANTS))
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise BadOption(f"{threads} threads make no sense.", f"Give a number from 1 to {MOST_THREADS}.")
    if kernels == "numpy" or (kernels is None and not compiled()):
        return NumpyBackend(exact)
    if not compiled():
        raise BadOption(f"The kernels {kernels} are not here: {NO_KERNELS}.", GET_KERNELS)
    return CpuBackend(_machine(threads or default_threads(), kernels), exact)


def _machine(threads: int, kernels: str | None) -> Any:
    from . import _native

    here = _native.variants()
    if kernels is not None and kernels not in here:
        raise BadOption(
            f"This processor ({platform.machine()}) cannot run the kernels {kernels!r}.", f"It can: {', '.join(here)}."
        )
    return _native.Machine(threads, kernels or "")


class NumpyBackend(TapedBackend):
    """Where nothing was compiled. Always exact."""

    name = "cpu"
    features = frozenset(FEATURES) - {"compile", "burst"}

    def __init__(self, exact: bool):
        super().__init__(NumpyKernels())
        self.exact = exact

    def info(self) -> Info:
        details = {} if compiled() else {"note": f"{NO_KERNELS}. {GET_KERNELS}"}
        return Info(self.name, f"NumPy on {platform.machine()}", "float32", self.exact, self.features, details)

    def new_cache(self, specs: Sequence[LayerCache], slots: int, capacity: int, dtype: str | None = None) -> Cache:
        return HostCache(specs, slots, capacity, cache_dtype(dtype or "float32", self.features))


class CpuBackend(TapedBackend):
    """The contract over NativeKernels."""

    name = "cpu"
    features = frozenset(FEATURES)

    def __init__(self, machine: Any, exact: bool):
        from .kernels import NativeKernels

        super().__init__(NativeKernels(machine, exact))
        self.machine, self.exact = machine, exact
        self.compiled = ""  # what became of the last `compile`

    def info(self) -> Info:
        threads = self.machine.threads
        device = f"{self.machine.kernels} kernels, {threads} thread{'s' if threads > 1 else ''}"
        details = {
            "kernels": self.machine.kernels,
            "threads": threads,
            "training": "bfloat16 products, float32 sums" if self.kernels.narrow else "float32",
            "compile": self.compiled or "not asked for yet",
        }
        return Info(self.name, device, "float32", self.exact, self.features, details)

    def new_cache(self, specs: Sequence[LayerCache], slots: int, capacity: int, dtype: str | None = None) -> Cache:
        from .cache import CpuCache

        kept = cache_dtype(dtype or ("float32" if self.exact else "float16"), self.features)
        return CpuCache(specs, slots, capacity, kept)

    def footprint(self, tensor: Tensor) -> Footprint:
        from .weights import footprint

        return footprint(tensor, self.exact)

    def positions(self, step: Step, tokens: int) -> A:
        return self._moving(positions, step, tokens)

    def sharpness(self, step: Step, tokens: int, every: int, weight: float, ahead: int = 0) -> A:
        return self._moving(sharpness, step, tokens, every, weight, ahead)

    def _moving(self, rule: Callable[..., np.ndarray], step: Step, *rest: Any) -> A:
        """What the host makes of a step, made again at each replay."""
        recording = self.kernels.recording
        return self.array(rule(step, *rest)) if recording is None else Array(self, recording.moving(rule, step, *rest))

    def adapted_linear(self, x: A, weight: W, bias: W | None, down: W, up: W, scale: float) -> A:
        if not self.kernels.differentiating:
            return super().adapted_linear(x, weight, bias, down, up, scale)
        low = self.kernels.product(x.data, down.data if type(down) is Array else down)
        return self._call("adapted", (x, weight, bias, down, up, Array(self, low)), scale)

    def compile(self, fn: Callable[[A, Step], A], state: Sequence[Any] = ()) -> Callable[[A, Step], A]:
        from .recording import Replayed

        return Replayed(self, fn)

    @property
    def recording_gradients(self) -> bool:
        return self._tape is not None

    def numpy(self, a: A) -> np.ndarray:
        self.kernels.eager("a result read back to the host")
        return super().numpy(a)

    def _call(self, op: str, inputs: tuple, *rest: Any) -> Array:
        if op not in self.kernels.RECORDED:
            self.kernels.eager(f"{op}, which has no kernel")
        return super()._call(op, inputs, *rest)
