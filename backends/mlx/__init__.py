"""The mlx backend's face: is MLX here, and on what would it run? Nothing heavy is imported until `create`."""

from __future__ import annotations

import platform
import sys
from typing import TYPE_CHECKING

from ...registry import Plugin, Probe
from ..packages import hidden_by, version

if TYPE_CHECKING:
    from .backend import MlxBackend

LINUX_BUILDS = {"mlx-cuda-13": "CUDA", "mlx-cuda-12": "CUDA", "mlx-cuda": "CUDA", "mlx-cpu": "CPU"}


def probe() -> Probe:
    on_mac = sys.platform == "darwin"
    get = "pip install mlx" if on_mac else "pip install 'mlx[cpu]' (or 'mlx[cuda13]' with an NVIDIA GPU)"
    if on_mac and platform.machine() != "arm64":
        return Probe.missing("MLX needs a Mac with Apple silicon", "Use another backend.")
    if version("mlx") is None:
        return Probe.missing("the package mlx is not installed", get)
    if other := hidden_by("mlx", "mlx"):
        return Probe.missing(f"`import mlx` would find {other}", "Rename or move it, or run from another folder.")
    if on_mac:
        return Probe.available("Apple GPU (Metal)", priority=80)
    build = next((device for name, device in LINUX_BUILDS.items() if version(name)), None)
    if build is None:
        return Probe.missing("the package mlx is here without its Linux library", get)
    if build == "CUDA":
        return Probe.available("MLX on CUDA", priority=40)
    return Probe.available("MLX on CPU", priority=10, reason="correct but very slow: MLX's CPU build is for tests")


def create(exact: bool = False, threads: int | None = None, dtype: str | None = None) -> MlxBackend:
    """exact: float32 throughout. dtype of activations otherwise: None for bfloat16 on a GPU and float32 on the CPU,
    where there is no other; or float32, float16, bfloat16. Raises BadOption for `threads`: MLX has no such setting."""
    from .backend import open_backend

    return open_backend(exact, threads, dtype)


plugin = Plugin("mlx", probe, create)
