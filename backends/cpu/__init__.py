"""The cpu backend's face: what would compute here, and with how many threads. `create` alone imports an array
library."""

from __future__ import annotations

import importlib.util
import platform
from typing import TYPE_CHECKING

from ...registry import Plugin, Probe
from .threads import default_threads

if TYPE_CHECKING:
    from .backend import CpuBackend

NO_KERNELS = "its kernels were not compiled: NumPy computes instead, many times slower"
GET_KERNELS = "Install a C++17 compiler (GCC, Clang or MSVC), then install ondevice again."


def compiled() -> bool:
    """Whether the native kernels are installed."""
    return importlib.util.find_spec(f"{__name__}._native") is not None


def probe() -> Probe:
    threads = default_threads()
    device = f"{platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"
    if compiled():
        return Probe.available(device, priority=50)
    return Probe.available(device, priority=10, reason=NO_KERNELS, hint=GET_KERNELS)


def create(exact: bool = False, threads: int | None = None, kernels: str | None = None) -> CpuBackend:
    """exact: float32 activations in front of quantized weights and in the cache (otherwise int8 in groups of 16, and
    float16; and, on processors that have them, products of bfloat16 numbers in training). threads: None for one a
    physical core that this process may use. kernels: avx512_bf16, avx512, avx2, neon, portable or
    numpy; None for what $ONDEVICE_CPU_KERNELS says, else for the best that this processor has. Raises BadOption."""
    from .backend import open_backend

    return open_backend(exact, threads, kernels)


plugin = Plugin("cpu", probe, create)
