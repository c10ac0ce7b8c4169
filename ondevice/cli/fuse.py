"""`ondevice fuse MODEL ADAPTER… DEST`: a model with its adapters worked in."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from . import console
from .model_options import adapter_choice, open_model

SHARE = 0.25


@click.command("fuse")
@click.argument("model")
@click.argument("adapters", metavar="ADAPTER[:WEIGHT]…", nargs=-1, required=True)
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Keep nothing quantized.")
@click.option("--bits", type=click.Choice(["2", "3", "4", "5", "6", "8"]), help="Of the tensors that change.")
@click.option("--group-size", type=click.Choice(["32", "64", "128"]), help="Numbers that share a scale.")
@click.option(
    "--max-loss", default=SHARE, show_default=True, help="How much of the adapters' effect may be lost, as a share."
)
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="What it is measured on.")
@click.option("--tokens", default=512, show_default=True, type=click.IntRange(16), help="Tokens it is measured on.")
@click.option("--seed", default=0, show_default=True, help="Of the text that the model writes where none is given.")
@click.option("--backend", metavar="NAME", help="Where it is measured; default: the best one here.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(model, adapters, dest, dtype, bits, group_size, max_loss, text, tokens, seed, backend, as_json):
    """Write MODEL with its adapters worked in as the new Hugging Face folder DEST.

    Tensors stay in the type or the bits that they have. Rounding to few bits can erase an adapter: so the result is
    held to MODEL with the adapters attached before anything is written (KL divergence, on a text or on what the adapted
    model itself says), and the tensors that change get more bits where too much would be lost. With --bits or --dtype
    that is an error instead.
    """
    from ..tools.fuse import Fused, Measured, Options, fuse

    whole = {"bits": bits and int(bits), "group_size": group_size and int(group_size)}
    options = Options(dtype, **whole, share=max_loss, text=text, tokens=tokens, seed=seed)
    chosen = [adapter_choice(a) for a in adapters]
    with open_model(model, chosen, backend=backend, exact=True) as session, console.progress("Fusing") as line:
        for event in fuse(session, dest, options):
            if isinstance(event, Fused):
                result = event
            elif isinstance(event, Measured):
                console.status(_way(event, max_loss))
            else:
                line.title, line.unit = event.stage, event.unit
                line.update(event.done, event.total)
    facts = {"model": model, "adapters": list(adapters)} | asdict(result) | {"drift": asdict(result.drift)}
    console.json(facts) if as_json else _tell(facts)


def _way(way, share: float) -> str:
    what = f"{way.bits} bits" if way.bits else "As it is stored"
    verdict = "" if way.share <= share else ": too much"
    return f"{what}: {way.share:.1%} of the adapter's effect is lost{verdict}."


def _tell(facts: dict) -> None:
    made = ", ".join(f"{size / 1e6:.1f} MB {name}" for name, size in facts["formats"].items())
    effect, drift, last = facts["effect"], facts["drift"], facts["tried"][-1]
    console.answer(f"{facts['model']} + {', '.join(facts['adapters'])} -> {facts['path']}")
    console.answer(f"{facts['nbytes'] / 1e6:.1f} MB: {made}")
    console.answer(f"adapter's effect  KL {effect['mean']:.4g} mean, {effect['most']:.4g} at most")
    console.answer(
        f"lost in fusing    KL {drift['mean']:.4g} mean, {drift['most']:.4g} at most: "
        f"{last['share']:.1%} of the effect; same top-1 {drift['top1']:.1%}"
    )
    if len(facts["tried"]) > 1:
        console.answer(f"The {facts['touched']} tensors that change were raised to {last['bits']} bits.")
    if facts["untied"]:
        console.answer("Embedding and head were one and now are two: the adapter changes them apart.")
    console.answer(f"Done in {facts['seconds']:.1f} s.")
