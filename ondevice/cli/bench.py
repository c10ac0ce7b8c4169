"""`ondevice bench MODEL…`: load, prefill and decode speed."""

from __future__ import annotations

from pathlib import Path

import click

from . import console
from .model_options import adapter_option, open_model, runtime_options


@click.command("bench")
@click.argument("models", metavar="MODEL", nargs=-1, required=True)
@click.option("--prompt-tokens", default=512, show_default=True, type=click.IntRange(1), help="Tokens of the prefill.")
@click.option("--generate-tokens", default=64, show_default=True, type=click.IntRange(1), help="Tokens decoded.")
@click.option("--depth", default=0, show_default=True, type=click.IntRange(0), help="Context in front of the decode.")
@click.option("--repeat", default=3, show_default=True, type=click.IntRange(1))
@click.option("--random-weights", is_flag=True, help="MODEL is a config.json; weights are made up, in --bits.")
@click.option("--bits", default="4", show_default=True, type=click.Choice(["2", "3", "4", "5", "6", "8", "16", "32"]))
@click.option("--group-size", default="32", show_default=True, type=click.Choice(["32", "64", "128"]))
@adapter_option()
@runtime_options()
@click.option("--json", "as_json", is_flag=True, help="One JSON object (several models: a list) on stdout.")
def command(models, random_weights, bits, group_size, as_json, backend, exact, context, threads, adapters, **numbers):
    """Measure each MODEL: medians over the repeats, after a warm-up. Several models run one after the other."""
    from ..errors import BadOption
    from ..runtime.bench import BenchOptions, Measured, bench
    from ..runtime.engine import Engine

    if adapters and random_weights:
        raise BadOption("An adapter makes no sense on random weights.", "Leave out --adapter or --random-weights.")
    options, results = BenchOptions(**numbers), []
    for model in models:
        shape = (int(bits), int(group_size)) if random_weights else None
        context = context or options.prompt_tokens + options.depth + options.generate_tokens + 2
        runtime = {"backend": backend, "exact": exact, "threads": threads}
        decoder, capacity, load_seconds = _open(model, shape, context, adapters, **runtime)
        engine = Engine(decoder, capacity)
        with console.progress(f"Measuring {model}", unit="repeats") as progress:
            for done, event in enumerate(bench(engine, options), 1):
                if isinstance(event, Measured):
                    measured = event
                else:
                    progress.update(done, options.repeat)
        facts = _facts(model, decoder.ops, load_seconds, options, measured)
        results.append(facts | {"adapters": [{"path": path, "weight": weight} for path, weight in adapters]})
    if as_json:
        console.json(results[0] if len(results) == 1 else results)
        return
    for r in results:
        low, high = r["decode_spread"]
        console.answer(f"{r['model']}   {r['backend']}: {r['device']}")
        console.answer(f"  load            {r['load_seconds']:.2f} s")
        console.answer(
            f"  first token     {r['time_to_first_token_seconds']:.3f} s behind {options.prompt_tokens} tokens"
        )
        console.answer(f"  prefill {options.prompt_tokens:5}   {r['prefill_tokens_per_second']:.1f} tokens/s")
        console.answer(
            f"  decode at {options.depth:5} {r['decode_tokens_per_second']:.1f} tokens/s ({low:.1f} to {high:.1f})"
        )
        console.answer(f"  peak memory     {r['peak_memory_bytes'] / 1e6:.0f} MB")


def _open(model: str, random_shape: tuple[int, int] | None, context: int, adapters, **options):
    """(decoder, capacity, seconds to load)"""
    import time

    if random_shape is None:
        session = open_model(model, adapters, context=context, **options)
        return session.decoder, session.capacity, session.load_seconds
    from ..checkpoint.files import read_object
    from ..models.decoder import Decoder
    from ..models.families import family_for
    from ..models.random import random_weights
    from ..registry import create_backend

    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    hf = read_object(path, 1 << 20)
    config = family_for(hf, path).config(hf)
    ops = create_backend(options["backend"], exact=options["exact"], threads=options["threads"])
    started = time.perf_counter()
    decoder = Decoder(config, ops, random_weights(config, ops, *random_shape))
    return decoder, min(context, config.context), time.perf_counter() - started


def _facts(model, ops, load_seconds, options, measured) -> dict:
    return {
        "model": model,
        "backend": ops.name,
        "device": ops.info().device,
        "prompt_tokens": options.prompt_tokens,
        "generate_tokens": options.generate_tokens,
        "depth": options.depth,
        "repeat": options.repeat,
        "load_seconds": load_seconds,
        "time_to_first_token_seconds": measured.median("prefill_seconds"),
        "prefill_tokens_per_second": measured.median("prefill_tokens_per_second"),
        "decode_tokens_per_second": measured.median("decode_tokens_per_second"),
        "prefill_spread": measured.spread("prefill_tokens_per_second"),
        "decode_spread": measured.spread("decode_tokens_per_second"),
        "peak_memory_bytes": measured.peak_memory_bytes,
    }
