"""The cuda backend's face: is PyTorch here, and does it see a GPU? Torch itself is not imported until `create`."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ...registry import Plugin, Probe
from ..packages import hidden_by, version

if TYPE_CHECKING:
    from .backend import CudaBackend

GET = "pip install torch"


def probe() -> Probe:
    torch = version("torch")
    if torch is None:
        return Probe.missing("the package torch is not installed", GET)
    if other := hidden_by("torch", "torch"):
        return Probe.missing(f"`import torch` would find {other}", "Rename or move it, or run from another folder.")
    gpus = gpu_count()
    if gpus and not torch.endswith("+cpu"):
        return Probe.available(f"{gpus} NVIDIA GPU{'s' if gpus > 1 else ''}, torch {torch}", priority=90)
    why = "this torch is built without CUDA" if gpus else "no NVIDIA GPU was found"
    hint = f"For the GPU, install a torch with CUDA: {GET}" if gpus else ""
    return Probe.available("torch on CPU", priority=5, reason=f"{why}; quantized weights are held dense", hint=hint)


def gpu_count() -> int:
    """NVIDIA GPUs that the driver offers, asked for without torch: 0.1 s with one, nothing without."""
    windows = sys.platform == "win32"
    if not windows and not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/dxg").exists():
        return 0
    try:
        driver = ctypes.CDLL("nvcuda.dll" if windows else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def create(
    exact: bool = False, threads: int | None = None, dtype: str | None = None, device: str | None = None
) -> CudaBackend:
    """exact: float32 throughout. threads: of torch's CPU device. dtype of activations otherwise: None for bfloat16 on a
    GPU and float32 on the CPU, or float32, float16, bfloat16. device: a torch device; None: a GPU if there is one."""
    from .backend import open_backend

    return open_backend(exact, threads, dtype, device)


plugin = Plugin("cuda", probe, create)
