"""`ondevice bench MODEL…`: load, prefill and decode speed, beside what the machine could do at most."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from . import console
from .model_options import adapter_option, only, open_model, runtime_options

if TYPE_CHECKING:
    from ..models.decoder import Decoder
    from ..runtime.bench import BenchOptions, Measured, Work
    from ..runtime.limits import Limits


class Opened(NamedTuple):
    decoder: Decoder
    capacity: int
    load_seconds: float
    work: Work
    kv_dtype: str | None


class Numbers(click.ParamType):
    """One whole number, or several with commas between."""

    name = "N[,N…]"

    def __init__(self, least: int):
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        try:
            found = tuple(dict.fromkeys(int(n) for n in str(value).split(",")))
        except ValueError:
            found = ()
        if not found or min(found) < self.least:
            self.fail(f"{value!r} is not whole numbers from {self.least} on, with commas between.", param, ctx)
        return found


@click.command("bench")
@click.argument("models", metavar="MODEL…", nargs=-1, required=True)
@click.option("--prompt-tokens", default="512", show_default=True, type=Numbers(1), help="Tokens of each prefill.")
@click.option("--generate-tokens", default=64, show_default=True, type=click.IntRange(1), help="Tokens decoded.")
@click.option("--depth", "depths", default="0", show_default=True, type=Numbers(0), help="Context before each decode.")
@click.option("--repeat", default=3, show_default=True, type=click.IntRange(1), help="Rounds that are measured.")
@click.option("--random-weights", is_flag=True, help="MODEL is a config.json; weights are made up, in --bits.")
@click.option("--bits", default="4", show_default=True, type=click.Choice(["2", "3", "4", "5", "6", "8", "16", "32"]),
    help="Of the weights that are made up.")  # fmt: skip
@click.option("--group-size", default="32", show_default=True, type=click.Choice(["32", "64", "128"]),
    help="Of them, numbers that share a scale.")  # fmt: skip
@adapter_option()
@runtime_options(kv_bits=True)
@click.option("--plot", metavar="FILE", help="Draw the speeds (.png, .svg, .pdf).")
@click.option("--json", "as_json", is_flag=True, help="One JSON object (several models or backends: a list) on stdout.")
def command(
    models, random_weights, bits, group_size, as_json, plot, backend, exact, context, threads, kv_dtype, adapters,
    **numbers,
):  # fmt: skip
    """Measure each MODEL: medians over the repeats, after a warm-up. Several models, and several --backend with commas
    between, run one after the other."""
    from .. import pictures
    from ..errors import BadOption
    from ..runtime.bench import BenchOptions

    if adapters and random_weights:
        raise BadOption("An adapter makes no sense on random weights.", "Leave out --adapter or --random-weights.")
    only("--random-weights", random_weights, "bits", "group_size")
    if plot:
        pictures.require(plot)
    options, results, limits = BenchOptions(**numbers), [], {}
    shape = (int(bits), int(group_size)) if random_weights else None
    for model in models:
        for name in (backend or "").split(","):
            runtime = {"backend": name or None, "exact": exact, "threads": threads, "kv_dtype": kv_dtype}
            facts = _benched(model, shape, context or options.context, adapters, options, limits, runtime)
            results.append(facts | {"adapters": [{"path": path, "weight": weight} for path, weight in adapters]})
    if plot:
        _draw(plot, results)
    if as_json:
        console.json(results[0] if len(results) == 1 else results)
        return
    for result in results:
        _print(result)


def _benched(model: str, shape, context: int, adapters, options: BenchOptions, limits: dict, runtime: dict) -> dict:
    """One model on one backend, which is gone when the next one comes: each has the memory for itself."""
    opened = _open(model, shape, context, adapters, **runtime)
    limit = _limits(opened.decoder.ops, limits)
    return _facts(model, opened, options, _measure(model, opened, options), limit)


def _measure(model: str, opened: Opened, options: BenchOptions) -> Measured:
    from ..runtime.bench import Measured, bench
    from ..runtime.engine import Engine

    with console.progress(f"Measuring {model}", unit="repeats") as progress:
        engine = Engine(opened.decoder, opened.capacity, opened.kv_dtype)
        for done, event in enumerate(bench(engine, options), 1):
            if isinstance(event, Measured):
                return event
            progress.update(done, options.repeat)


def _open(model: str, random_shape: tuple[int, int] | None, context: int, adapters, **options) -> Opened:
    from ..runtime.bench import work
    from ..runtime.memory import bytes_per_token, tensors_of

    kept = options["kv_dtype"]
    if random_shape is None:
        session = open_model(model, adapters, context=context, **options)
        of_context = bytes_per_token(session.config, session.backend, kept)
        needed = work(session.config, tensors_of(session.parameters), of_context)
        return Opened(session.decoder, session.capacity, session.load_seconds, needed, kept)
    from ..checkpoint.files import read_object
    from ..models.decoder import Decoder
    from ..models.families import family_for, text_part
    from ..models.random import blank_weights, random_weights
    from ..registry import create_backend

    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    hf = text_part(read_object(path))
    config = family_for(hf, path).config(hf)
    ops = create_backend(options["backend"], exact=options["exact"], threads=options["threads"])
    needed = work(config, blank_weights(config, *random_shape), bytes_per_token(config, ops, kept))
    started = time.perf_counter()
    decoder = Decoder(config, ops, random_weights(config, ops, *random_shape))
    return Opened(decoder, min(context, config.context), time.perf_counter() - started, needed, kept)


def _limits(ops, known: dict[int, Limits]) -> Limits | None:
    """Of the processor, measured once for each number of threads; None for a backend that computes elsewhere."""
    from ..machine import cores
    from ..runtime.limits import measure

    if ops.asynchronous or ops.device_memory() is not None:
        return None
    threads = ops.info().details.get("threads") or cores()
    if threads not in known:
        console.status("Measuring what this machine can do at most")
        known[threads] = measure(threads)
    return known[threads]


def _facts(model: str, opened: Opened, options: BenchOptions, measured: Measured, limits: Limits | None) -> dict:
    """What programs get. The plain keys are those of the first prompt length and the first depth."""
    from ..runtime.bench import spread

    ops, many = opened.decoder.ops, options.generate_tokens
    prefill, decode = [], []
    for n in options.prompt_tokens:
        middle, low, high = spread(measured.prefill(n))
        operations = middle * opened.work.operations_at(n / 2)
        prefill.append(_row("tokens", n, middle, low, high) | {"operations_per_second": operations})
    for depth in options.depths:
        middle, low, high = spread(measured.decode(depth))
        read = middle * opened.work.bytes_at(max(depth, 1) + many / 2)
        decode.append(_row("depth", depth, middle, low, high) | {"bytes_per_second": read})
    first, fast = prefill[0], decode[0]
    return {
        "model": model,
        "backend": ops.name,
        "device": ops.info().device,
        "prompt_tokens": first["tokens"],
        "generate_tokens": many,
        "depth": fast["depth"],
        "repeat": options.repeat,
        "load_seconds": opened.load_seconds,
        "time_to_first_token_seconds": first["tokens"] / first["tokens_per_second"],
        "prefill_tokens_per_second": first["tokens_per_second"],
        "decode_tokens_per_second": fast["tokens_per_second"],
        "prefill_spread": [first["least"], first["most"]],
        "decode_spread": [fast["least"], fast["most"]],
        "prefill": prefill,
        "decode": decode,
        "weight_bytes_per_token": opened.work.weight_bytes,
        "operations_per_token": opened.work.weight_operations,
        "kv_bytes_per_token": opened.work.context_bytes,
        "limits": None if limits is None else vars(limits),
        "peak_memory_bytes": measured.peak_memory_bytes,
    }


def _row(what: str, n: int, middle: float, low: float, high: float) -> dict:
    return {what: n, "tokens_per_second": middle, "least": low, "most": high}


def _print(r: dict) -> None:
    limits, first = r["limits"], r["time_to_first_token_seconds"]
    console.answer(f"{r['model']}   {r['backend']}: {r['device']}")
    console.answer(f"  load            {r['load_seconds']:.2f} s")
    console.answer(f"  first token     {first:.3f} s behind {r['prompt_tokens']} tokens")
    for p in r["prefill"]:
        rate, most = p["operations_per_second"] / 1e9, limits and limits["float32_per_second"] / 1e9
        beside = f", of {most:.0f} in float32 here" if most else ""
        console.answer(f"  prefill {p['tokens']:7} {_speed(p)}   {rate:.0f} billion operations/s{beside}")
    for d in r["decode"]:
        rate, most = d["bytes_per_second"] / 1e9, limits and limits["bytes_per_second"] / 1e9
        beside = f", of {most:.1f} that memory gives" if most else ""
        console.answer(f"  decode at {d['depth']:5} {_speed(d)}   {rate:.1f} GB/s{beside}")
    console.answer(f"  peak memory     {r['peak_memory_bytes'] / 1e6:.0f} MB")


def _speed(row: dict) -> str:
    return f"{row['tokens_per_second']:.1f} tokens/s ({row['least']:.1f} to {row['most']:.1f})"


def _draw(path: str, results: list[dict]) -> None:
    """Decode against prefill, a point each; over several depths, a line each."""
    from .. import pictures

    names = [f"{Path(r['model']).name} {r['backend']}" for r in results]
    if len(results[0]["decode"]) > 1:
        series = {
            name: ([d["depth"] for d in r["decode"]], [d["tokens_per_second"] for d in r["decode"]])
            for name, r in zip(names, results, strict=True)
        }
        pictures.lines(path, "Decode", series, "tokens of context", "tokens/s")
        return
    places = {
        name: [(r["prefill_tokens_per_second"], r["decode_tokens_per_second"], "")]
        for name, r in zip(names, results, strict=True)
    }
    pictures.points(path, "Speed", places, "prefill, tokens/s", "decode, tokens/s")
