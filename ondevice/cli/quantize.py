"""`ondevice quantize MODEL DEST`: a model in fewer bits."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from . import console
from .pull import fetch

METHODS = ("auto", "gptq", "awq", "search", "rtn")
BITS = ("2", "3", "4", "5", "6", "8")


@click.command("quantize")
@click.argument("model")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--method", type=click.Choice(METHODS), help="Default: auto, which gives bits where they matter most.")
@click.option("--bits", type=click.Choice(BITS), help="For every matrix; default: 4.")
@click.option("--group-size", type=click.Choice(["32", "64", "128"]), help="Numbers that share a scale; default: 64.")
@click.option("--requantize", is_flag=True, help="Take weights that are quantized already as they come.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(model, dest, method, bits, group_size, requantize, as_json):
    """Write MODEL (a folder, a .gguf file or a model's name) as the new Hugging Face folder DEST with its matrices in
    2 to 8 bits, in MLX's format: it runs here and in mlx-lm."""
    from ..tools.quantize import Options, quantize

    given = {"method": method, "bits": bits and int(bits), "group_size": group_size and int(group_size)}
    options = Options(**{name: value for name, value in given.items() if value is not None}, requantize=requantize)
    source = fetch(model)
    with _bars() as show:
        result = quantize(source, dest, options, show)
    facts = asdict(result) | {"source": str(source)}
    console.json(facts) if as_json else _tell(facts)


class _bars:
    """One progress line a stage."""

    def __enter__(self):
        self.stage, self.line = "", None
        return self

    def __call__(self, event) -> None:
        if event.stage != self.stage:
            self.__exit__()
            self.stage, self.line = event.stage, console.progress(event.stage, event.unit).__enter__()
        self.line.update(event.done, event.total)

    def __exit__(self, *_) -> None:
        if self.line:
            self.line.__exit__()


def _tell(facts: dict) -> None:
    made = ", ".join(f"{size / 1e6:.1f} MB {name}" for name, size in facts["formats"].items())
    console.answer(f"{facts['source']} -> {facts['path']}")
    console.answer(f"{facts['nbytes'] / 1e6:.1f} MB, {facts['bpw']:.2f} bits a parameter: {made}")
    for note in facts["notes"]:
        console.answer(note)
    console.answer(f"Done in {facts['seconds']:.1f} s.")
