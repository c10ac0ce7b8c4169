"""`ondevice convert SOURCE DEST`: GGUF or Hugging Face in; a Hugging Face folder or a GGUF out. Adapters, too."""

from __future__ import annotations

import time
from pathlib import Path

import click

from ..errors import BadOption
from . import console
from .pull import fetch

DTYPES = ("float32", "float16", "bfloat16")


@click.command("convert")
@click.argument("source")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option(
    "--to", type=click.Choice(["gguf", "mlx", "hf", "peft"]),
    help="gguf: one file, for llama.cpp. mlx: a folder for mlx-lm, quantized tensors as they are. hf: a folder for"
    " transformers, nothing quantized. Default: gguf where DEST ends so, else mlx. Of an adapter: mlx or peft.",
)  # fmt: skip
@click.option("--type", "kind", metavar="TYPE", help="GGUF's type of matrices: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, "
    "q4_0; default: what they are, or the nearest.")  # fmt: skip
@click.option("--dtype", type=click.Choice(DTYPES), help="Type of dense tensors (and of K-quants, which need one).")
@click.option("--dequantize", is_flag=True, help="Keep nothing quantized: everything goes to --dtype.")
@click.option("--model", help="Of an adapter: the model that it is for; default: the one that it names.")
@click.option("--plan", "only_plan", is_flag=True, help="Say bytes, disk and time, and stop there.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(source, dest, to, kind, dtype, dequantize, model, only_plan, as_json):
    """Write SOURCE (a folder, a .gguf file or a model's name) as DEST, with its tokenizer, template and settings: a new
    folder, or a new file NAME.gguf. Quantized codes are kept where the new format has a place for them; what had to be
    rounded, and how much that changed it, is said at the end. An adapter's folder goes from PEFT's format to mlx-lm's
    (--to mlx), or back (--to peft)."""
    from ..adapters import adapter_format
    from ..checkpoint import open_checkpoint
    from ..tools.convert import estimate

    if found := adapter_format(source):
        _refuse_for_adapters({"--type": kind, "--dtype": dtype, "--dequantize": dequantize, "--plan": only_plan})
        facts = _convert_adapter(source, dest, to or ("mlx" if found == "peft" else "peft"), model)
        console.json(facts) if as_json else _tell_adapter(facts)
        return
    if model or to == "peft":
        raise BadOption(
            f"{source} is no adapter, so {'--model' if model else '--to peft'} has no place.", "Leave it out."
        )

    start = time.perf_counter()
    to = to or ("gguf" if dest.suffix == ".gguf" else "mlx")
    _check(to, dest, kind, dtype or dequantize)
    with open_checkpoint(fetch(source)) as checkpoint:
        work, run = _work(checkpoint, to, kind, dtype, dequantize)
        facts = {"source": str(checkpoint.path), "path": str(dest), "to": to, "tensors": len(work.specs)}
        facts |= {"source_bytes": checkpoint.nbytes, "bytes": work.nbytes, "formats": work.formats}
        facts |= {"notes": list(work.notes)} if work.notes else {}
        if only_plan:
            expected = estimate(work, dest)
            facts |= {"free_bytes": expected.free_bytes, "seconds": expected.seconds}
        else:
            _run(work, run, dest)
            facts |= {"seconds": time.perf_counter() - start} | _losses(work)
    console.json(facts) if as_json else _tell(facts)


def _refuse_for_adapters(options: dict) -> None:
    for name, value in options.items():
        if value:
            raise BadOption(f"{name} is for models, not for adapters.", "Leave it out.")


def _convert_adapter(source: str, dest: Path, to: str, model: str | None) -> dict:
    from ..adapters import Modules, base_of, read_adapter, write_adapter
    from ..checkpoint import open_checkpoint
    from ..checkpoint.write import require_new
    from ..models.families import family_of

    if to not in ("peft", "mlx"):
        raise BadOption(f"An adapter cannot go to {to}.", "Give --to peft or --to mlx, or fuse it: ondevice fuse.")
    require_new(dest)
    model = model or base_of(source)
    if not model:
        raise BadOption(f"{source} does not name the model that it is for.", "Add --model MODEL.")
    with open_checkpoint(fetch(model)) as checkpoint:
        family, hf = family_of(checkpoint)
        modules = Modules(family, family.config(hf))
    adapter = read_adapter(source, modules)
    write_adapter(dest, adapter, modules, to)
    size = sum(file.stat().st_size for file in dest.iterdir())
    counted = {"parameters": adapter.parameters, "weights": len(adapter.updates), "bytes": size}
    return {"source": source, "path": str(dest), "to": to, "model": model, **counted}


def _tell_adapter(facts: dict) -> None:
    console.answer(f"{facts['source']} (an adapter of {facts['model']}) -> {facts['path']}, in {facts['to']}'s format")
    console.answer(
        f"{facts['parameters'] / 1e6:.2f} M parameters on {facts['weights']} weights, {facts['bytes']} bytes"
    )


def _check(to: str, dest: Path, kind: str | None, dense: object) -> None:
    """Options that belong to another format are refused rather than ignored."""
    if to == "gguf" and dense:
        raise BadOption("--dtype and --dequantize are for folders.", "For a GGUF give --type, for example --type f16.")
    if to != "gguf" and kind:
        raise BadOption("--type is for GGUF files.", "Add --to gguf, or give --dtype (and --dequantize) for a folder.")
    if to == "gguf" and dest.suffix != ".gguf":
        raise BadOption(f"A GGUF is a file, and {dest} does not end in .gguf.", f"Call it {dest}.gguf.")


def _work(checkpoint, to: str, kind: str | None, dtype: str | None, dequantize: bool):
    """The plan, and what runs it."""
    from ..tools.convert import convert, convert_gguf, plan, plan_gguf, plan_hf

    if to == "gguf":
        return plan_gguf(checkpoint, kind), convert_gguf
    if to == "hf":
        return plan_hf(checkpoint, dtype), convert
    return plan(checkpoint, dtype, dequantize), convert


def _run(work, run, dest: Path) -> None:
    with console.progress("Converting", unit="bytes") as progress:
        done = 0

        def written(spec):
            nonlocal done
            done += spec.nbytes
            progress.update(done, work.nbytes)

        run(work, dest, written)


def _losses(work) -> dict:
    """What was rounded on the way to a GGUF: the relative error of each such tensor, and of all numbers together."""
    losses = getattr(work, "losses", None)
    if losses is None:
        return {}
    rounded = {name: loss.relative for name, loss in losses.items() if loss.error}
    kept = sum(loss.kept for loss in losses.values())
    return {"codes_kept": kept, "relative_error": work.loss.relative, "relative_errors": rounded}


def _tell(facts: dict) -> None:
    """The plan or the result, for people."""
    planned = "free_bytes" in facts
    made = ", ".join(f"{size / 1e6:.1f} MB {name}" for name, size in facts["formats"].items())
    console.answer(f"{facts['source']} ({facts['source_bytes'] / 1e6:.1f} MB) -> {facts['path']}")
    console.answer(f"{facts['tensors']} tensors, {facts['bytes'] / 1e6:.1f} MB: {made}")
    for note in facts.get("notes", ()):
        console.answer(f"Note: {note}")
    if "relative_errors" in facts:
        _tell_losses(facts)
    if planned:
        room = "enough" if facts["free_bytes"] > facts["bytes"] else "NOT enough"
        console.answer(f"The disk has {facts['free_bytes'] / 1e9:.1f} GB free: {room}. About {facts['seconds']:.0f} s.")
    else:
        console.answer(f"Done in {facts['seconds']:.1f} s.")


def _tell_losses(facts: dict) -> None:
    errors, kept = facts["relative_errors"], facts["codes_kept"]
    if not errors:
        console.answer("Every number is kept exactly.")
        return
    worst = max(errors, key=errors.__getitem__)
    rest = facts["tensors"] - kept
    what = (
        f"{rest} of {facts['tensors']} tensors are rounded" if rest else "All codes are kept, some scales are rounded"
    )
    share = f"relative error {facts['relative_error']:.2%} of all numbers, at most {errors[worst]:.2%} ({worst})"
    console.answer(f"{what}: {share}.")
