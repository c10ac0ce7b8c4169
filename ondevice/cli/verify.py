"""`ondevice verify MODEL`: one prompt through every backend that is ready here."""

from __future__ import annotations

import click

from . import console
from .model_options import model_argument
from .pull import fetch

PROMPT = "The quick brown fox jumps over the lazy dog, and then"


@click.command("verify")
@model_argument
@click.option("--prompt", default=PROMPT, show_default=True, help="What they run.")
@click.option("--backend", "names", multiple=True, help="Only this one (may be given several times).")
@click.option("--layers", is_flag=True, help="Show the difference behind every layer.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(model, prompt, names, layers, as_json):
    """Run one prompt through every backend in one process, in exact mode, and compare each layer's output and the
    logits with the reference backend's. Exit status 1 when one differs by more than the tolerance."""
    from ..checkpoint import open_checkpoint
    from ..errors import BadOption, OnDeviceError
    from ..models.families import family_of
    from ..models.parameters import Parameters
    from ..registry import create_backend, probe_backends
    from ..runtime.side_files import tokenizer_of
    from ..tools.evaluate.backends import TOLERANCE, compare, observe

    names = names or [n for n, probe in probe_backends().items() if probe.ready and n != "reference"]
    backends = [create_backend(name, exact=True) for name in names]
    with open_checkpoint(fetch(model)) as checkpoint:
        family, hf = family_of(checkpoint)
        config = family.config(hf)
        parameters = Parameters(family, config, checkpoint)
        ids = tokenizer_of(checkpoint).encode(prompt)
        if not ids:
            raise BadOption("The prompt has no tokens.", "Give some text.")
        console.status(f"{len(ids)} tokens through reference …")
        wanted = observe(config, parameters, create_backend("reference", exact=True), ids)
        results = []
        for ops in backends:
            console.status(f"{len(ids)} tokens through {ops.name} …")
            results.append(compare(ops, wanted, observe(config, parameters, ops, ids)))
    if as_json:
        console.json(
            {"model": model, "tokens": len(ids), "tolerance": TOLERANCE, "backends": [_facts(r) for r in results]}
        )
    else:
        for r in results:
            for name, difference in r.differences.items() if layers else ():
                console.answer(f"  {r.backend:10} {name:24} {difference:.2e}")
            verdict = "agrees" if r.agrees else "DIFFERS"
            console.answer(
                f"{r.backend:10} {verdict}: worst {r.worst:.1e}, logits {r.differences['logits']:.1e} of their scale"
                f" (tolerance {TOLERANCE:.0e}); {'same' if r.same_top1 else 'other'} likeliest tokens; {r.device}"
            )
    wrong = [r.backend for r in results if not r.agrees]
    if wrong:
        raise OnDeviceError(f"{', '.join(wrong)}: not the reference's results on {model}.", "Run again with --layers.")


def _facts(r) -> dict:
    return {
        "backend": r.backend,
        "device": r.device,
        "agrees": r.agrees,
        "same_top1": r.same_top1,
        "worst": r.worst,
        "differences": r.differences,
    }
