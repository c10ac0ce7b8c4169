"""How many threads to compute with: one a physical core that this process may use."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

from ...machine import groups


def default_threads() -> int:
    """Kernels are bound by memory or by the vector units, which the two threads of a core share: a second one only
    takes turns. A container's quota counts as well: threads beyond it would be put to sleep within a token."""
    return max(1, min(_physical_cores(), _quota()))


def _physical_cores() -> int:
    if sys.platform == "darwin":
        return _performance_cores()
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # Windows
        return max(1, (os.cpu_count() or 1) // 2)
    siblings = {_siblings(cpu) for cpu in allowed}
    return len(siblings)


def _siblings(cpu: int) -> str:
    """The hardware threads of a processor's core, as the kernel lists them; the processor itself if it doesn't."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _performance_cores() -> int:
    """Of an Apple processor: the efficiency cores would be waited for."""
    import subprocess

    try:
        answer = subprocess.run(
            ["sysctl", "-n", "hw.perflevel0.physicalcpu"], capture_output=True, timeout=2, check=True
        )
        return int(answer.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return max(1, (os.cpu_count() or 1) // 2)


def _quota() -> int:
    """Processors' worth of time that the control groups (version 2, then 1) grant, rounded up."""
    most = math.inf
    for version, group in groups("cpu"):
        names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        try:
            quota, period = " ".join((group / name).read_text() for name in names).split()
            most = min(most, int(quota) / int(period) if quota not in ("max", "-1") else math.inf)
        except (OSError, ValueError):
            continue
    return math.ceil(most) if most < math.inf else 1 << 30
