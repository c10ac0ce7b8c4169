"""`ondevice average MODEL ADAPTER… DEST`: several adapters of one model into one."""

from __future__ import annotations

from pathlib import Path

import click

from . import console
from .model_options import adapter_choice


@click.command("average")
@click.argument("model")
@click.argument("adapters", metavar="ADAPTER[:WEIGHT]…", nargs=-1, required=True)
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--exact", is_flag=True, help="The mean of their changes instead of their factors: ranks add up.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(model, adapters, dest, exact, as_json):
    """Write the weighted mean of ADAPTERs, all trained on MODEL, as the new adapter DEST.

    That is the server's part in federated learning: each device trains at home (lora-train --init with the last mean),
    only the adapters travel, and a WEIGHT says how many examples each has seen. MODEL's weights are not read.
    """
    from .. import hub
    from ..adapters import Modules, averaged, read_adapter, stacked, write_adapter
    from ..checkpoint import open_checkpoint
    from ..checkpoint.write import require_new
    from ..models.families import family_of

    require_new(dest)
    with open_checkpoint(hub.resolve(model, console.status)) as checkpoint:
        family, hf = family_of(checkpoint)
        modules = Modules(family, family.config(hf))
    chosen = [adapter_choice(a) for a in adapters]
    shares = [(read_adapter(path, modules), weight) for path, weight in chosen]
    mean = stacked(shares) if exact else averaged(shares)
    write_adapter(dest, mean, modules)
    total, rank = sum(weight for _, weight in chosen), max((u.rank for u in mean.updates.values()), default=0)
    facts = {
        "path": str(dest),
        "adapters": {path: weight / total for path, weight in chosen},
        "parameters": mean.parameters,
        "rank": rank,
    }
    if as_json:
        console.json(facts)
        return
    console.answer(f"{dest}: {mean.parameters:,} parameters, rank {rank}, the mean of")
    for path, share in facts["adapters"].items():
        console.answer(f"  {share:6.1%}  {path}")
