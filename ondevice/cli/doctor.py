"""`ondevice doctor`: what works here, what is missing, and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import console

if TYPE_CHECKING:
    import numpy as np

    from ..backends.base import Backend
    from ..registry import Probe

PACKAGES = ("numpy", "tokenizers", "sentencepiece", "jinja2", "huggingface-hub", "gguf", "mlx", "torch", "transformers")
COMPILERS = ("c++", "g++", "clang++", "cl")
TINY = {  # a Llama just large enough for groups of 32
    "model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "rms_norm_eps": 1e-6,
}  # fmt: skip
TOLERANCE = 0.05  # of the largest logit: a sound backend stays below it with 8-bit activations, a wrong one far above


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(as_json):
    """Run a tiny model on every backend that is ready here, and say what the others lack and how to get it."""
    facts = {**_installation(), **_machine(), **_models(), "backends": _backends()}
    if as_json:
        console.json(facts)
        return
    versions = ", ".join(f"{name} {version}" for name, version in facts["packages"].items() if version)
    memory = f", {facts['memory_bytes'] / 1e9:.0f} GB of memory" if facts["memory_bytes"] else ""
    here = [name for name, is_here in facts["catalog"].items() if is_here]
    console.answer(f"ondevice {facts['ondevice']} at {facts['path']}, Python {facts['python']}")
    console.answer(f"{facts['platform']}, {facts['cores']} cores{memory}; C++ compiler: {facts['compiler'] or 'none'}")
    console.answer(f"With {versions}")
    console.answer(f"Models are kept in {facts['home']} ({facts['free_bytes'] / 1e9:.0f} GB free)")
    console.answer(f"Here: {', '.join(here) or 'none of the catalog yet'} (`ondevice models` lists more)")
    for b in facts["backends"]:
        console.answer(f"{'ok ' if b['available'] else '-- '} {b['name']:10} {b['device'] or b['reason']}")
        for line in (b["device"] and b["reason"], b["hint"]):
            if line:
                console.answer(f"               {line}")


def _installation() -> dict:
    from .. import __version__
    from ..installed import version

    package = Path(__file__).parent.parent
    return {
        "ondevice": __version__,
        "path": str(package),
        "links": (package / "backends").is_symlink(),  # a checkout's links; an installed wheel has folders
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": {name: version(name) for name in PACKAGES},
    }


def _machine() -> dict:
    from ..machine import cores, memory_bytes

    compilers = (os.environ.get("CXX"), *COMPILERS)
    return {
        "platform": platform.platform(),
        "cores": cores(),
        "memory_bytes": memory_bytes(),
        "compiler": next((found for name in compilers if name and (found := shutil.which(name))), None),
    }


def _models() -> dict:
    from .. import hub
    from ..catalog import CATALOG

    home = hub.home()
    there = next(p for p in (home, *home.parents) if p.exists())
    return {
        "home": str(home),
        "free_bytes": shutil.disk_usage(there).free,
        "catalog": {name: (home / "models" / name / entry.file).is_file() for name, entry in CATALOG.items()},
    }


def _backends() -> list[dict]:
    from ..registry import create_backend, probe_backends

    wanted = _tiny_logits(create_backend("reference", exact=True))
    return [_examine(name, probe, wanted) for name, probe in probe_backends().items()]


def _examine(name: str, probe: Probe, wanted: np.ndarray) -> dict:
    """A probe says that a backend should work; only a computation shows that it does."""
    facts = {"name": name, "available": probe.ready, "reason": probe.reason, "hint": probe.hint, "device": probe.device}
    facts["details"] = {}
    if not probe.ready:
        return facts
    import numpy as np

    from ..registry import create_backend

    try:
        ops = create_backend(name)
        info = ops.info()
        error = float(np.abs(_tiny_logits(ops) - wanted).max() / np.abs(wanted).max())
    except Exception as failure:  # whatever a driver or library throws is the answer
        message = str(failure).splitlines()[0] if str(failure) else ""
        return facts | {
            "available": False,
            "device": "",
            "reason": f"a small computation failed: {type(failure).__name__}: {message}",
            "hint": "Reinstall its package, or its driver.",
        }
    facts["details"] = {"dtype": info.dtype, "features": sorted(info.features), "error": error, **info.details}
    if error <= TOLERANCE:  # which NaN is not
        return facts | {"device": info.device}
    return facts | {
        "available": False,
        "device": "",
        "reason": f"it computes wrongly on {info.device}: off by {error:.0%}",
        "hint": "Update its package; if that does not help, please report this.",
    }


def _tiny_logits(ops: Backend) -> np.ndarray:
    """What a tiny random 4-bit Llama says on a backend: seven tokens at once, then one more through the cache."""
    import numpy as np

    from ..backends.base import Step
    from ..models.decoder import Decoder
    from ..models.families.llama import llama
    from ..models.random import random_weights

    config = llama.config(TINY)
    decoder = Decoder(config, ops, random_weights(config, ops))
    cache = decoder.new_cache(1, 8)
    seen = []
    for start, ids in ((0, [[3, 1, 4, 1, 5, 9, 2]]), (7, [[6]])):
        place = (np.array([n], np.int32) for n in (start, len(ids[0]), 0))
        step = Step(*place, cache=cache)
        seen.append(ops.numpy(decoder(ops.array(np.array(ids, np.int32)), step)).reshape(-1, TINY["vocab_size"]))
        cache.advance(step.slots, step.lengths)
    return np.concatenate(seen).astype(np.float32)
