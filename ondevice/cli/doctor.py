"""`ondevice doctor`: what works here, what is missing, and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
import sys

import click

from . import console


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(as_json):
    """Run a small real computation on every backend that is ready here, and say what the others lack."""
    facts = {"python": platform.python_version(), "platform": platform.platform(), **_machine()}
    facts["backends"] = _backends()
    if as_json:
        console.json(facts)
        return
    console.answer(f"Python {facts['python']} on {facts['platform']}, {facts['cores']} cores")
    console.answer(f"Models are kept in {facts['home']} ({facts['free_bytes'] / 1e9:.0f} GB free)")
    for b in facts["backends"]:
        console.answer(f"{'ok ' if b['available'] else '-- '} {b['name']:10} {b['device'] or b['reason']}")
        if b["available"] and b["reason"]:
            console.answer(f"               {b['reason']}")
        if b["hint"]:
            console.answer(f"               {b['hint']}")


def _machine() -> dict:
    from .. import __version__, hub

    home = hub.home()
    there = next(p for p in (home, *home.parents) if p.exists())
    return {
        "ondevice": __version__,
        "executable": sys.executable,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "home": str(home),
        "free_bytes": shutil.disk_usage(there).free,
    }


def _backends() -> list[dict]:
    from ..registry import probe_backends

    return [_examine(name, probe) for name, probe in probe_backends().items()]


def _examine(name: str, probe) -> dict:
    """A probe says that a backend should work; only a computation shows that it does."""
    facts = {"name": name, "available": probe.ready, "reason": probe.reason, "hint": probe.hint, "device": probe.device}
    facts["details"] = {}
    if not probe.ready:
        return facts
    from ..registry import create_backend

    try:
        ops = create_backend(name)
        info = ops.info()
        error = _compute(ops)
    except Exception as failure:  # whatever a driver or library throws is the answer
        message = str(failure).splitlines()[0] if str(failure) else ""
        return facts | {
            "available": False,
            "reason": f"a small computation failed: {type(failure).__name__}: {message}",
            "hint": "reinstall its package, or its driver",
        }
    facts |= {
        "device": info.device,
        "details": {"dtype": info.dtype, "features": sorted(info.features), **info.details},
    }
    if error > 0.05:
        facts |= {
            "available": False,
            "reason": f"it computes wrongly: off by {error:.0%}",
            "hint": "report this, please",
        }
    return facts


def _compute(ops) -> float:
    """A norm and a 4-bit linear map, against NumPy: the largest difference, as a share of the largest value."""
    import numpy as np

    from ..noise import generator
    from ..schemes import quantize_affine, to_float
    from ..tensors import dense

    draw = generator(0, "doctor")
    x = draw.standard_normal((3, 64), np.float32)
    tensor = quantize_affine(draw.standard_normal((32, 64), np.float32), 4, 32, "float32")
    gain = dense(np.ones(64, np.float32))
    y = ops.linear(ops.rms_norm(ops.array(x), ops.prepare(gain), 1e-6), ops.prepare(tensor))
    wanted = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) @ to_float(tensor).T
    return float(np.abs(ops.numpy(y) - wanted).max() / np.abs(wanted).max())
