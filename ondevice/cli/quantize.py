"""`ondevice quantize MODEL DEST`: a model in fewer bits."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from . import console
from .model_options import only, size
from .pull import fetch

METHODS = ("auto", "gptq", "awq", "search", "rtn", "distill")
BITS = ("2", "3", "4", "5", "6", "8")


@click.command("quantize")
@click.argument("model")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--method", type=click.Choice(METHODS), help="Default: auto, which gives bits where they matter most.")
@click.option(
    "--mode", type=click.Choice(["affine", "mxfp4"]), help="MLX's kinds of code; mxfp4: 4-bit floats, as rtn."
)
@click.option("--bits", type=click.Choice(BITS), help="For every matrix (auto: on average); default: 4.")
@click.option("--group-size", type=click.Choice(["32", "64", "128"]), help="Numbers that share a scale; default: 64.")
@click.option("--target-size", metavar="SIZE", help="Of all weights, such as 80MB (auto).")
@click.option("--target-bpw", type=float, metavar="BITS", help="A parameter on average, scales included (auto).")
@click.option(
    "--calibration", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A text, or .jsonl of conversations; default: what the model itself says.",
)  # fmt: skip
@click.option("--tokens", type=click.IntRange(2), help="Of calibration; default: 8192.")
@click.option("--seed", type=int, help="Of the model's own text; default: 0.")
@click.option("--start", type=click.Choice(METHODS[:-1]), help="What distill begins with; default: auto.")
@click.option("--steps", type=click.IntRange(1), help="Of distill, at most.")
@click.option("--minutes", type=float, help="Of distill's training, about; default: 10.")
@click.option("--backend", default="cpu", show_default=True, metavar="NAME", help="What calibration runs on.")
@click.option("--requantize", is_flag=True, help="Take weights that are quantized already as they come.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(model, dest, target_size, backend, requantize, as_json, **given):
    """Write MODEL (a folder, a .gguf file or a model's name) as the new Hugging Face folder DEST with its matrices in
    2 to 8 bits, in MLX's format: it runs here and in mlx-lm. Interrupted, the same command goes on where it was."""
    from ..tools.quantize import Options, quantize

    given["target_bytes"] = size("--target-size", target_size) if target_size else None
    for name in ("bits", "group_size"):
        given[name] = given[name] and int(given[name])
    if given["mode"] == "mxfp4":
        given["method"] = given["method"] or "rtn"
    options = Options(**{name: value for name, value in given.items() if value is not None}, requantize=requantize)
    _refuse_idle(options)
    source = fetch(model)
    with console.resumable(kept=options.method != "rtn"), console.stages() as show:
        result = quantize(source, dest, options, show, backend)
    facts = asdict(result) | {"source": str(source)}
    console.json(facts) if as_json else _tell(facts)


def _refuse_idle(options) -> None:
    only("--method distill", options.method == "distill", "start", "steps", "minutes")
    only("methods that are calibrated", options.method != "rtn", "calibration", "tokens", "seed", "backend")
    only("a size that no target gives", not options.targeted, "bits", "group_size")
    only("--mode affine", options.mode == "affine", "group_size")


def _tell(facts: dict) -> None:
    made = ", ".join(f"{size / 1e6:.1f} MB {name}" for name, size in facts["formats"].items())
    console.answer(f"{facts['source']} -> {facts['path']}")
    console.answer(f"{facts['nbytes'] / 1e6:.1f} MB, {facts['bpw']:.2f} bits a parameter: {made}")
    if facts["taught"]:
        console.taught("distilling", facts["taught"])
    for note in facts["notes"]:
        console.answer(note)
    console.answer(f"Done in {facts['seconds']:.1f} s.")
