"""This machine's processors and memory: how much there is, how much is free, how much this process has; and its control
groups."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

CGROUP, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
LIMITS = {  # of a control group's memory, by version: the most, what is in use, what of it are pages of files
    2: ("memory.max", "memory.current", ("inactive_file", "active_file")),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
}


def groups(controller: str) -> Iterator[tuple[int, Path]]:
    """The control groups that this process is in for `controller` and those that they lie in, with their version."""
    try:
        lines = [line.split(":", 2) for line in OWN.read_text().splitlines()]
    except OSError:
        return
    for number, controllers, path in lines:
        version = 2 if number == "0" else 1
        if version == 1 and controller not in controllers.split(","):
            continue
        root = CGROUP if version == 2 else CGROUP / controller
        group = root / path.lstrip("/")
        yield from ((version, each) for each in (group, *group.parents) if each == root or root in each.parents)


def cores() -> int:
    """Processors that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def memory_bytes() -> int | None:
    """What this process may use at most: the machine's memory, or its container's if that is less; None: unknown."""
    limits = [most for most, _ in _limits()]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=None)


def free_bytes() -> int | None:
    """What could be had now without swapping anybody out; None: the system does not say."""
    free = [most - taken for most, taken in _limits()]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass
    return max(0, min(free)) if free else None


def _limits() -> Iterator[tuple[int, int]]:
    """Of each control group that has one: the most memory, and what is in use but for pages of files."""
    for version, group in groups("memory"):
        limit, usage, files = LIMITS[version]
        try:
            most, used = int((group / limit).read_text()), int((group / usage).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            yield most, used - sum(int(stat[name]) for name in files)
        except (OSError, ValueError, KeyError):  # no such group, or "max"
            continue


def used_bytes() -> int:
    """What this process holds now; where the system does not say, the most it has held."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return peak_memory_bytes()


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
