"""`ondevice inspect MODEL`: what a model is made of and what it needs; with --router, where its experts send a text."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import console
from .model_options import kv_bits_option, model_argument

if TYPE_CHECKING:
    from ..tools.inspect.anatomy import Share
    from ..tools.inspect.report import Report
    from ..tools.inspect.routing import LayerLoad, Routed


@click.command("inspect")
@model_argument
@click.option("--context", type=click.IntRange(1), help="Tokens to plan memory for; default: as chat would.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Texts at once.")
@click.option("--rank", type=click.IntRange(1), default=8, show_default=True, help="Of the LoRA to count.")
@click.option("--backend", metavar="NAME", help="Plan for this one; default: the best one here.")
@click.option("--exact", is_flag=True, help="Plan for float32 throughout.")
@kv_bits_option()
@click.option("--router", metavar="TEXT", help="Send TEXT through the experts and count where it goes.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw it: .png, .svg or .pdf.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(model, context, batch, rank, backend, exact, kv_dtype, router, plot, as_json):
    """What MODEL is made of: parameters by component and layer, bytes, the memory it needs, its tokens and template.
    MODEL may also be a config.json, or a Hub repo, of which only that is fetched: then the weights are not needed."""
    from .. import pictures

    if plot:
        pictures.require(plot)
    if router is not None:
        _route(model, router, plot, as_json, backend=backend, exact=exact)
        return
    from ..registry import create_backend
    from ..tools.inspect.report import report
    from ..tools.inspect.sources import open_source

    with open_source(model, console.status) as source:
        ops = create_backend(backend, **({"exact": True} if exact else {}))
        found = report(source, ops, context, batch, rank, kv_dtype)
        if as_json:
            console.json(_facts(found))
        else:
            _show(found)
        if plot:
            _draw(found, plot)
            console.status(f"Drawn in {plot}")


def _facts(r: Report) -> dict[str, Any]:
    whole = r.anatomy.whole
    return {
        "model": r.source.model,
        "path": r.source.path,
        "family": r.source.family.name,
        "weights_here": r.source.checkpoint is not None,
        "licence": r.licence,
        "context": r.source.config.context,
        "parameters": whole.parameters,
        "active_parameters": whole.active,
        "weights": whole.parameters - whole.biases,
        "biases": whole.biases,
        "bytes": whole.nbytes,
        "bits_per_weight": whole.bits,
        "left_out": r.left_out,
        "lora": {"rank": r.rank, **r.lora},
        "components": [_share(share) for share in r.anatomy.components()],
        "layers": [_share(share) | {"is": what} for share, what in zip(r.anatomy.layers(), r.layers, strict=True)],
        "kv_bytes_per_token": r.kv_bytes,
        "memory": asdict(r.plan)
        | {"total": r.plan.total, "needed": r.plan.needed, "backend": r.backend, "machine": r.machine}
        | {"would_fit": {how: plan.needed for how, plan in r.fitting}},
        "tokens": None if r.tokens is None else asdict(r.tokens),
        "template": None if r.template is None else [asdict(check) for check in r.template],
    }


def _share(share: Share) -> dict[str, Any]:
    return asdict(share) | {"bits": share.bits}


def _show(r: Report) -> None:
    config, whole = r.source.config, r.anatomy.whole
    console.answer(f"{r.source.model}   {r.source.family.name}, {len(config.layers)} layers of width {config.width}")
    if not r.source.checkpoint:
        console.answer("            from its config alone: the weights are not here")
    console.answer(f"licence     {r.licence or 'not said'}")
    active = "" if whole.active == whole.parameters else f", {_count(whole.active)} active for each token"
    biases = f", {_count(whole.biases)} of them biases" if whole.biases else ", no biases"
    console.answer(f"parameters  {whole.parameters:,} ({_count(whole.parameters)}){active}{biases}")
    if config.tied:
        console.answer("            the head is the embedding: counted once")
    console.answer(f"stored      {_size(whole.nbytes)}, {whole.bits:.2f} bits a parameter: {', '.join(whole.formats)}")
    if r.left_out:
        console.answer(f"            {r.left_out}")
    trained = ", ".join(f"{_count(n)} ({name})" for name, n in r.lora.items())
    console.answer(f"LoRA        rank {r.rank} trains {trained}")
    _memory(r)
    console.answer()
    rows = [_row(share, whole) for share in r.anatomy.components()]
    console.table(rows, ("component", "parameters", "share", "active", "bytes", "bits", "stored as"))
    console.answer()
    console.table(_layers(r), ("layers", "each has", "bytes", "made of"))
    _text(r)


def _row(share: Share, whole: Share) -> tuple[str, ...]:
    part = f"{share.parameters / whole.parameters:.1%}"
    return (
        share.name, _count(share.parameters), part, _count(share.active), _size(share.nbytes), f"{share.bits:.2f}",
        ", ".join(share.formats),
    )  # fmt: skip


def _layers(r: Report) -> list[tuple[str, ...]]:
    """Neighbours that are alike in one row."""
    shares = zip(r.anatomy.layers(), r.layers, strict=True)
    rows = []
    for (count, nbytes, what), alike in groupby(shares, lambda s: (s[0].parameters, s[0].nbytes, s[1])):
        names = [share.name for share, _ in alike]
        where = names[0] if len(names) == 1 else f"{names[0]}-{names[-1]}"
        rows.append((where, _count(count), _size(nbytes), what))
    return rows


def _memory(r: Report) -> None:
    p = r.plan
    texts = f" of {p.batch} texts" if p.batch > 1 else ""
    console.answer(f"cache       {_size(r.kv_bytes)} a token; made for {r.source.config.context} tokens")
    console.answer(f"memory      {_size(p.total)} on {r.backend} for {p.context} tokens{texts}")
    parts = {"weights": p.weights + p.mapped, "cache": p.cache, "activations": p.activations, "program": p.base}
    console.answer(f"            {', '.join(f'{name} {_size(nbytes)}' for name, nbytes in parts.items())}")
    if p.idle:
        console.answer(
            f"            {_size(p.idle)} of it are experts that a token leaves alone: they may stay on disk"
        )
    if r.machine is not None and p.needed > r.machine:
        fits = "; or ".join(f"{how} ({_size(plan.needed)})" for how, plan in r.fitting)
        advice = f"what would: {fits}" if fits else "take a smaller model"
        console.answer(f"            does not fit in the {_size(r.machine)} here; {advice}")


def _text(r: Report) -> None:
    if r.tokens is None:
        console.answer(f"\ntokens      unknown: {r.untold}")
        return
    named = ", ".join(f"{role} {text} ({id})" for role, (id, text) in r.tokens.roles.items())
    stops = ", ".join(f"{text.replace(' ', '·')} ({id})" for id, text in r.tokens.stops)
    console.answer(f"\ntokens      {r.tokens.size}, {r.tokens.special} of them special: {named}")
    console.answer(f"answers     end at {stops or 'nothing'}")
    if not r.template:
        console.answer("template    none: not made for conversation")
    for check in r.template or ():
        mark = {True: "ok", False: "WRONG", None: "no"}[check.ok]
        console.answer(f"template    {mark:5} {check.name}{': ' + check.note if check.note else ''}")


def _draw(r: Report, path: Path) -> None:
    """Millions of parameters by layer, stacked by component."""
    from .. import pictures

    parts: dict[str, dict[str, float]] = {}
    for part in r.anatomy.parts:
        bars = parts.setdefault(part.component, {})
        where = part.name.split(".")[0] if part.layer is None else str(part.layer)
        where = "norm" if part.layer is None and part.component == "norms" else where
        bars[where] = bars.get(where, 0.0) + part.parameters / 1e6
    title = f"{r.source.model}: {_count(r.anatomy.whole.parameters)} parameters"
    pictures.bars(path, title, parts, "layer", "millions of parameters")


def _route(model: str, text: str, plot: Path | None, as_json: bool, **options: Any) -> None:
    from ..tools.inspect.routing import Progress, routed
    from .model_options import open_model

    with open_model(model, **options) as session, console.progress("Routing", unit="tokens") as progress:
        for event in routed(session, text):
            if isinstance(event, Progress):
                progress.update(event.done, event.total)
            else:
                found = event
    if plot:
        _draw_routes(model, found, plot)
        console.status(f"Drawn in {plot}")
    if as_json:
        console.json({"model": model, "tokens": found.tokens, "layers": [_load(x) for x in found.layers]})
    else:
        _show_routes(found)


def _load(x: LayerLoad) -> dict[str, Any]:
    return {
        "layer": x.layer, "per_token": x.per_token, "entropy": x.entropy, "doubt": x.doubt, "dead": x.dead,
        "counts": x.counts.tolist(), "load": x.load.tolist(),
    }  # fmt: skip


def _show_routes(found: Routed) -> None:
    rows = []
    for x in found.layers:
        busiest = ", ".join(f"{e} ({x.load[e]:.1f}x)" for e in x.load.argsort()[::-1][:3])
        some = ", ".join(map(str, x.dead[:8])) + (" …" if len(x.dead) > 8 else "")
        unused = f"{len(x.dead)}: {some}" if x.dead else "none"
        where = f"{x.per_token} of {len(x.counts)}"
        rows.append((str(x.layer), where, f"{x.entropy:.3f}", f"{x.doubt:.3f}", busiest, unused))
    console.table(rows, ("layer", "experts", "entropy", "doubt", "busiest (even shares)", "dead"))
    console.answer(f"\n{found.tokens} tokens. entropy: 1 where all experts get the same; doubt: 1 where the router")
    console.answer("prefers none; dead: experts that no token of this text was sent to.")


def _draw_routes(model: str, found: Routed, path: Path) -> None:
    from .. import pictures

    loads, rows = [x.load for x in found.layers], [str(x.layer) for x in found.layers]
    title = f"{model}: where {found.tokens} tokens go"
    pictures.heat(path, title, loads, "expert", "layer", rows=rows, scale="even shares")


def _count(number: int) -> str:
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number / size < 100 else f"{number / size:.1f}{unit}"
    return str(number)


def _size(nbytes: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes:.0f} B"
