"""What this process has used of the machine's memory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ..errors import OnDeviceError


def peak_memory_bytes() -> int:
    """The most memory this process has held at once, in bytes, memory-mapped files that were touched included."""
    if sys.platform == "win32":
        import ctypes
        from ctypes import wintypes

        class Counters(ctypes.Structure):
            _fields_ = [("cb", wintypes.DWORD), ("faults", wintypes.DWORD)] + [
                (name, ctypes.c_size_t) for name in ("peak", "now", "q0", "q1", "q2", "q3", "pagefile", "peak_pagefile")
            ]

        counters = Counters(cb=ctypes.sizeof(Counters))
        process = ctypes.windll.kernel32.GetCurrentProcess()
        ctypes.windll.psapi.GetProcessMemoryInfo(process, ctypes.byref(counters), counters.cb)
        return int(counters.peak)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_bytes() -> int | None:
    """What this process may use at most: the machine's memory, or its container's if that is less; None: unknown."""
    limits = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(file).read_text()))
        except (OSError, ValueError):  # no such container, or "max"
            continue
    return min(limits, default=None)


def require(nbytes: int, what: str) -> None:
    """Refuses, before anything is read, what could only swap the machine to a standstill."""
    most = memory_bytes()
    if most is not None and nbytes > most:
        raise OnDeviceError(
            f"{what} needs {nbytes / 1e9:.1f} GB and this machine has {most / 1e9:.1f} GB of memory.",
            "Take a smaller or more quantized model.",
        )
