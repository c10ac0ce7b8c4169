"""`ondevice convert SOURCE DEST`: GGUF or Hugging Face in, a Hugging Face folder out."""

from __future__ import annotations

import time
from pathlib import Path

import click

from . import console
from .pull import fetch

DTYPES = ("float32", "float16", "bfloat16")


@click.command("convert")
@click.argument("source")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(DTYPES), help="Type of dense tensors (and of K-quants, which need one).")
@click.option("--dequantize", is_flag=True, help="Keep nothing quantized: everything goes to --dtype.")
@click.option("--plan", "only_plan", is_flag=True, help="Say bytes, disk and time, and stop there.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(source, dest, dtype, dequantize, only_plan, as_json):
    """Write SOURCE (a folder, a .gguf file or a model's name) as the new Hugging Face folder DEST, with its tokenizer,
    template and settings. GGUF's Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 keep their codes, in MLX's format."""
    from ..checkpoint import open_checkpoint
    from ..tools.convert import convert, estimate, plan

    start = time.perf_counter()
    with open_checkpoint(fetch(source)) as checkpoint:
        work = plan(checkpoint, dtype, dequantize)
        facts = {"source": str(checkpoint.path), "path": str(dest), "tensors": len(work.specs)}
        facts |= {"source_bytes": checkpoint.nbytes, "bytes": work.nbytes, "formats": work.formats}
        if only_plan:
            expected = estimate(work, dest)
            facts |= {"free_bytes": expected.free_bytes, "seconds": expected.seconds}
        else:
            with console.progress("Converting", unit="bytes") as progress:
                done = 0

                def written(spec):
                    nonlocal done
                    done += spec.nbytes
                    progress.update(done, work.nbytes)

                convert(work, dest, written)
            facts["seconds"] = time.perf_counter() - start
    if as_json:
        console.json(facts)
    else:
        _tell(facts)


def _tell(facts: dict) -> None:
    """The plan or the result, for people."""
    planned = "free_bytes" in facts
    made = ", ".join(f"{size / 1e6:.1f} MB {name}" for name, size in facts["formats"].items())
    console.answer(f"{facts['source']} ({facts['source_bytes'] / 1e6:.1f} MB) -> {facts['path']}")
    console.answer(f"{facts['tensors']} tensors, {facts['bytes'] / 1e6:.1f} MB: {made}")
    if planned:
        room = "enough" if facts["free_bytes"] > facts["bytes"] else "NOT enough"
        console.answer(f"The disk has {facts['free_bytes'] / 1e9:.1f} GB free: {room}. About {facts['seconds']:.0f} s.")
    else:
        console.answer(f"Done in {facts['seconds']:.1f} s.")
