"""`ondevice prune MODEL DEST`: a model with less in it."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, fields
from pathlib import Path

import click

from ..errors import BadOption
from . import console
from .model_options import only
from .pull import fetch

FILE = click.Path(path_type=Path)


@click.command("prune")
@click.argument("model")
@click.argument("dest", required=False, type=FILE)
@click.option("--target", metavar="P%", help="Drop this share of all parameters, of whatever costs least.")
@click.option("--vocabulary", metavar="N|P%", help="Keep so many tokens, those that matter most.")
@click.option("--keep-vocabulary", metavar="FILE", type=FILE, help="Keep the tokens of this text, no others.")
@click.option("--layers", metavar="N|P%", help="Drop so many whole layers, those that matter least.")
@click.option("--drop-layers", metavar="I,J,…", help="Drop these layers; the first is 0.")
@click.option("--channels", metavar="N|P%", help="Drop so many channels of each feed-forward.")
@click.option("--heads", metavar="N|P%", help="Drop so many key/value heads of each layer, with their queries.")
@click.option("--experts", metavar="N|P%", help="Drop so many experts of each layer.")
@click.option("--sparsity", metavar="P%|N:M", help="Make so many weights zero: 50%, or 2 of every 4 as 2:4.")
@click.option("--method", type=click.Choice(["sparsegpt", "wanda", "magnitude"]), help="Of --sparsity; "
    "default: sparsegpt.")  # fmt: skip
@click.option("--calibration", metavar="FILE", type=FILE, help="A text or .jsonl to judge by; default: what the model "
    "itself says.")  # fmt: skip
@click.option("--tokens", type=click.IntRange(2), help="Of it that are run; default: 4096.")
@click.option("--seed", type=int, help="Of what the model says; default: 0.")
@click.option("--no-repair", is_flag=True, help="Leave what stays as it is, instead of making up for what goes.")
@click.option("--dequantize", is_flag=True, help="Take quantized weights as the numbers they stand for (bfloat16).")
@click.option("--heal", metavar="DATA", help="Then teach it by the original, on a text, a .jsonl, or `self`: what the "
    "original says.")  # fmt: skip
@click.option("--heal-steps", type=click.IntRange(1), metavar="N", help="At most so many steps.")
@click.option("--heal-minutes", type=float, metavar="MINUTES", help="About so long; default: 10.")
@click.option("--heal-rate", type=float, metavar="RATE", help="The highest learning rate; default: 5e-4.")
@click.option("--backend", metavar="NAME", help="What healing runs on; default: cpu.")
@click.option("--dry-run", is_flag=True, help="Show what would go and why, and write nothing.")
@click.option("--plot", type=FILE, help="A picture of the scores: .png, .svg, …")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(model, dest, dry_run, plot, as_json, **given):
    """Write MODEL (a folder, a .gguf file or a model's name) as the new Hugging Face folder DEST with less in it: fewer
    tokens, layers, channels, heads or experts, or single weights made zero. What is left is an ordinary model."""
    from ..pictures import require
    from ..tools.prune import prune

    if (dest is None) != dry_run:
        raise BadOption(
            "There is no DEST to write to." if dest is None else "--dry-run writes nothing, but a DEST is given.",
            "Give a DEST, or --dry-run without one.",
        )
    if plot:
        require(plot)
    only("--sparsity", given["sparsity"], "method")
    only("--heal", given["heal"], "backend", "heal_steps", "heal_minutes", "heal_rate")
    options = _options(given)
    source = fetch(model)
    healing = bool(options.heal and dest)
    with console.resumable(kept=healing), console.stages() as show, closing(prune(source, dest, options)) as events:
        for event in events:
            if hasattr(event, "stage"):
                show(event)
    if plot:
        from ..tools.prune.pictures import draw

        draw(plot, event)
    facts = asdict(event) | {"source": str(source)}
    console.json(facts) if as_json else _tell(facts)


def _options(given: dict):
    """Options as given, read; defaults are the dataclass's."""
    from ..tools.prune import Amount, Options, Sparsity

    known = {field.name for field in fields(Options)}
    chosen = {name: value for name, value in given.items() if name in known and value not in (None, False)}
    for name in ("target", "vocabulary", "layers", "channels", "heads", "experts"):
        if name in chosen:
            chosen[name] = Amount.parse(chosen[name], f"--{name}")
    if "sparsity" in chosen:
        chosen["sparsity"] = Sparsity.parse(chosen["sparsity"])
    if "drop_layers" in chosen:
        chosen["drop_layers"] = _indices(chosen["drop_layers"])
    chosen.pop("heal", None)
    if healing := _healing(given):
        chosen["heal"] = healing
    return Options(**chosen, repair=not given["no_repair"])


def _healing(given: dict):
    from ..tools.prune import Lessons

    named = {"steps": "heal_steps", "minutes": "heal_minutes", "learning_rate": "heal_rate"}
    chosen = {field: given[name] for field, name in named.items() if given[name] is not None}
    if given["heal"] is None:
        return None
    data = None if given["heal"] == "self" else Path(given["heal"])
    return Lessons(data, seed=given["seed"] or 0, **chosen)


def _indices(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise BadOption(f"--drop-layers {text} is no list of layers.", "Give their numbers, such as 24,25,26.")
    return tuple(sorted({int(part) for part in parts}))


# ------------------------------------------------------------------------------------------------ for people


def _tell(facts: dict) -> None:
    for scores in facts["scores"]:
        console.table(
            [(row["name"], f"{row['value']:.3g}", _stays(row)) for row in scores["rows"]],
            (scores["kind"], scores["meaning"], scores["verdict"]),
        )
        console.answer()
    before, after = facts["before"], facts["after"]
    console.answer(f"{facts['source']} -> {facts['path'] or 'nothing is written'}")
    for kind, (old, new) in facts["sizes"].items():
        if old != new:
            console.answer(f"{kind:12}{old:,} -> {new:,}")
    console.answer(f"{'parameters':12}{_change(before['parameters'], after['parameters'])}")
    console.answer(f"{'bytes':12}{_change(before['nbytes'], after['nbytes'])}")
    if after["nonzero"] is not None:
        console.answer(f"{'not zero':12}{_change(before['nonzero'], after['nonzero'])}")
    if facts["healed"]:
        console.answer()
        console.taught("healing", facts["healed"])
    for note in facts["notes"]:
        console.answer(note)
    console.answer(f"Done in {facts['seconds']:.1f} s.")


def _stays(row: dict) -> str:
    return ("yes" if row["stays"] else "no") if row["of"] == 1 else f"{row['stays']:,} of {row['of']:,}"


def _change(old: int, new: int) -> str:
    return f"{old / 1e6:.1f} M -> {new / 1e6:.1f} M ({new / old - 1:+.1%})"
