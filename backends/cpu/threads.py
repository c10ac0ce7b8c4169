"""How many threads to compute with: one a physical core that this process may use."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


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
    for group in _groups():
        try:
            quota, period = (group / "cpu.max").read_text().split()
            most = min(most, math.inf if quota == "max" else int(quota) / int(period))
        except (OSError, ValueError):
            continue
    try:
        quota, period = ((CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        most = min(most, int(quota) / int(period) if int(quota) > 0 else math.inf)
    except (OSError, ValueError):
        pass
    return math.ceil(most) if most < math.inf else 1 << 30


def _groups() -> list[Path]:
    """This process's control group and those it lies in."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    path = next((line[3:].lstrip("/") for line in lines if line.startswith("0::")), "")
    group = CGROUP / path
    return [g for g in (group, *group.parents) if g == CGROUP or CGROUP in g.parents]
