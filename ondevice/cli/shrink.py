"""`ondevice shrink MODEL DEST --target-size 60MB`: a model made to fit, the best way that time allows."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from . import console
from .model_options import size
from .pull import fetch


@click.command("shrink")
@click.argument("model")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--target-size", metavar="SIZE", required=True, help="Of all weights, at most, such as 60MB.")
@click.option("--budget", "minutes", type=float, metavar="MINUTES", help="It takes no longer; default: 30.")
@click.option(
    "--calibration", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A text, or .jsonl of conversations; default: what the model itself says.",
)  # fmt: skip
@click.option("--tokens", type=click.IntRange(2), help="Of it that are used; default: 8192.")
@click.option("--seed", type=int, help="Of the model's own text; default: 0.")
@click.option("--requantize", is_flag=True, help="Take weights that are quantized already for what they stand for.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(model, dest, target_size, as_json, **given):
    """Write MODEL as the new folder DEST whose weights take no more than --target-size: ways to prune and quantize it
    are tried on a text, the best is kept, and REPORT.md in it says what each gave."""
    from ..tools.shrink import Options, Outcome, shrink

    options = Options(
        size("--target-size", target_size), **{name: value for name, value in given.items() if value is not None}
    )
    source = fetch(model)
    with console.resumable("What is found out"), console.stages() as show:
        for event in shrink(source, dest, options, show):
            if isinstance(event, Outcome):
                console.status(_line(asdict(event)))
    facts = asdict(event) | {"source": str(source), "hurried": event.hurried}
    console.json(facts) if as_json else _tell(facts)


def _line(outcome: dict) -> str:
    if outcome["failed"]:
        return f"{outcome['plan']}: {outcome['failed']}"
    return f"{outcome['plan']}: {outcome['nbytes'] / 1e6:.1f} MB, {_loss(outcome, 'loss ')}"


def _loss(outcome: dict, said: str = "") -> str:
    return "not measured" if outcome["loss"] is None else f"{said}{outcome['loss']:.4f}"


def _tell(facts: dict) -> None:
    rows = []
    for outcome in (facts["original"], *facts["cuts"], *facts["outcomes"]):
        made = not outcome["failed"]
        numbers = (f"{outcome['nbytes'] / 1e6:.1f}", _loss(outcome)) if made else ("", outcome["failed"])
        rows.append((outcome["plan"], *numbers, f"{outcome['seconds']:.0f} s"))
    console.table(rows, ("plan", "MB", "loss (nats a token)", "time"))
    for estimate in facts["left"]:
        foretold = "" if estimate["loss"] is None else f" (loss expected: {estimate['loss']:.4f})"
        console.answer(f"No time was left for: {estimate['plan']}{foretold}")
    if facts["hurried"]:
        from ..tools.shrink.events import TIME_WAS_UP

        console.answer(f"{TIME_WAS_UP} Give more --budget.")
    console.answer(f"{facts['source']} -> {facts['path']} ({facts['chosen']}); see {facts['path']}/REPORT.md")
