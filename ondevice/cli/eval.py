"""`ondevice eval MODEL … --text FILE`: perplexity, bits per byte, and how far models are from a reference."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import BadOption
from . import console
from .model_options import adapter_option, only, open_model, runtime_options

if TYPE_CHECKING:
    from ..runtime.session import Session
    from ..tools.evaluate.text import Evaluation, Miss

WINDOW = 512  # tokens


@click.command("eval")
@click.argument("models", metavar="MODEL…", nargs=-1, required=True)
@click.option("--text", "text_file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="UTF-8 text.")
@click.option("--against", metavar="REFERENCE", help="A model to compare with; it always runs exact.")
@click.option(
    "--window",
    "--context",
    "window",
    type=click.IntRange(2),
    help=f"Tokens a window; default: {WINDOW}, or what the model holds.",
)
@click.option("--tokens", type=click.IntRange(2), help="Only the first N tokens of the text.")
@click.option("--worst", type=click.IntRange(0), default=0, metavar="N", help="Show the N places that went worst.")
@click.option(
    "--plot", type=click.Path(path_type=Path), help="A picture of losses by position, or of KL: .png, .svg, …"
)
@click.option("--tasks", metavar="TASK,…", help="Tasks of lm-evaluation-harness, by name or as FILE.yaml.")
@click.option("--limit", type=click.IntRange(1), help="Of each task: only N documents.")
@click.option("--fewshot", type=click.IntRange(0), help="Of each task: examples in front; default: as it says.")
@click.option("--chat-template", is_flag=True, help="Ask tasks through the model's chat template.")
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Of tasks: answers side by side.")
@adapter_option()
@runtime_options(context=False, kv_bits=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(models, text_file, tasks, adapters, backend, exact, threads, as_json, **given):
    """How well each MODEL predicts a text (--text): perplexity and bits per byte; with --against also the mean KL
    divergence from a reference's predictions and how often both find the same token likeliest. Several models make a
    table; the reference's predictions are made once for all of them. Or how well it does tasks (--tasks)."""
    _check(text_file, tasks)
    opening = {"backend": backend, "threads": threads}
    if tasks:
        _tasks(models, tasks.split(","), given, adapters, opening | {"exact": exact}, as_json)
    else:
        _text(models, text_file, given, adapters, exact, opening, as_json)


def _check(text_file: Path | None, tasks: str | None) -> None:
    """Options that belong to the other kind of measure are refused rather than ignored."""
    if bool(text_file) == bool(tasks):
        raise BadOption("What to measure must be said, once.", "Give --text FILE or --tasks TASK.")
    only("--text", text_file, "against", "tokens", "worst", "plot", "kv_dtype")
    only("--tasks", tasks, "limit", "fewshot", "chat_template", "batch")


def _text(models, text_file, given, adapters, exact, opening, as_json) -> None:
    from ..pictures import require
    from ..tools.calibration.samples import read_text
    from ..tools.evaluate.pictures import draw

    against, plot, worst = given["against"], given["plot"], given["worst"]
    tokens = given["tokens"]
    if plot:
        require(plot)
    text = read_text(text_file)
    facts: list[dict[str, Any]] = []
    results: dict[str, Evaluation] = {}
    with ExitStack() as stack:
        reference = stack.enter_context(open_model(against, exact=True, **opening)) if against else None
        for group in [models] if against else [[model] for model in models]:
            with ExitStack() as opened:
                own = opening | {"exact": exact, "kv_dtype": given["kv_dtype"]}
                sessions = [opened.enter_context(open_model(m, adapters, **own)) for m in group]
                everyone = [*sessions, *([reference] if reference else [])]
                window = given["window"] or min(WINDOW, *(s.config.context for s in everyone))
                found = _evaluated(sessions, text, window, tokens, reference)
                for model, session, result in zip(group, sessions, found, strict=True):
                    results[model] = result
                    facts.append(_facts(model, session, result, worst) | {"context": window})
        common = {"against": against, "exact": exact, "kv_dtype": given["kv_dtype"]}
        if reference:
            common["reference"] = {"bytes": reference.checkpoint.nbytes, "bits_per_weight": _bits(reference)}
    if plot:
        draw(plot, results)
    if as_json:
        console.json(common | (facts[0] if len(models) == 1 else {"models": facts}))
    elif len(models) == 1:
        _tell_one(facts[0], against)
    else:
        _tell_many(facts, against, common)


def _tasks(models, tasks, given, adapters, opening, as_json) -> None:
    from dataclasses import asdict

    from ..tools.evaluate.tasks import TaskOptions, run_tasks

    options = TaskOptions(given["limit"], given["fewshot"], given["chat_template"], given["batch"], given["window"])
    found: list[dict[str, Any]] = []
    for model in models:
        with open_model(model, adapters, **opening) as session, console.progress("Tasks", "requests") as progress:
            measures = run_tasks(session, tasks, options, lambda what, done, total: progress.update(done, total))
        found += [{"model": model} | asdict(measure) for measure in measures]
    if as_json:
        console.json({"exact": opening["exact"], "measures": found})
        return
    header = ("model", "task", "metric", "value", "± error", "documents", "few-shot")
    console.table([_task_row(each) for each in found], header)


def _task_row(facts: dict[str, Any]) -> tuple[str, ...]:
    error = "" if facts["error"] is None else f"{facts['error']:.4f}"
    counts = (str(facts["documents"]), str(facts["fewshot"]))
    return (facts["model"], facts["task"], facts["metric"], f"{facts['value']:.4f}", error, *counts)


def _evaluated(sessions: list[Session], text: str, window: int, tokens: int | None, reference: Session | None):
    from ..tools.evaluate.text import Progress, evaluate_together

    with console.progress("Scoring", unit="windows") as progress:
        for event in evaluate_together(sessions, text, window, tokens, reference):
            if isinstance(event, Progress):
                progress.update(event.done, event.total)
    return event


def _bits(session: Session) -> float:
    """Stored bits a parameter."""
    from math import prod

    return session.checkpoint.nbytes * 8 / sum(map(prod, session.parameters.shapes.values()))


def _facts(model: str, session: Session, result: Evaluation, worst: int) -> dict[str, Any]:
    known = {"model": model, "backend": session.backend.name, "bytes": session.checkpoint.nbytes}
    known |= {"bits_per_weight": _bits(session)} | result.facts()
    misses = [_miss(session, miss) for miss in result.worst(worst)]
    return known | ({"worst": misses} if misses else {})


def _miss(session: Session, miss: Miss) -> dict[str, Any]:
    tokenizer = session.tokenizer
    told = {
        "position": miss.position,
        "before": "".join(tokenizer.piece(id) for id in miss.before),
        "token": tokenizer.piece(miss.token),
        "loss": miss.loss,
        "likeliest": tokenizer.piece(miss.likeliest),
    }
    if miss.kl is not None:
        told |= {"kl": miss.kl, "reference": tokenizer.piece(miss.wanted)}
    return told


# ------------------------------------------------------------------------------------------------ for people


def _tell_one(facts: dict[str, Any], against: str | None) -> None:
    places = f"({facts['scored']} predictions in {facts['tokens']} tokens)"
    console.answer(f"perplexity  {facts['perplexity']:.4f}   {places}")
    console.answer(f"bits/byte   {facts['bits_per_byte']:.4f}")
    if against:
        console.answer(f"reference   {facts['reference_perplexity']:.4f}")
        console.answer(f"KL          {facts['kl']:.6f} nats a token")
        console.answer(f"same top-1  {facts['top1']:.2%}")
    _tell_worst(facts)


def _tell_many(facts: list[dict[str, Any]], against: str | None, common: dict[str, Any]) -> None:
    header = ("model", "MB", "bits/weight", "perplexity", "bits/byte", *(("KL", "same top-1") if against else ()))
    rows = [_row(each) for each in facts]
    if against:
        known = common["reference"] | {
            "model": f"{against} (reference)",
            "perplexity": facts[0]["reference_perplexity"],
        }
        rows.insert(0, (*_row(known), "", ""))
    console.table(rows, header)
    for each in facts:
        if "worst" in each:
            console.answer()
            console.answer(each["model"])
            _tell_worst(each)


def _row(facts: dict[str, Any]) -> tuple[str, ...]:
    cells = [facts["model"], f"{facts['bytes'] / 1e6:.1f}", f"{facts['bits_per_weight']:.2f}"]
    cells.append(f"{facts['perplexity']:.4f}")
    cells.append(f"{facts['bits_per_byte']:.4f}" if "bits_per_byte" in facts else "")
    return tuple(cells) + ((f"{facts['kl']:.6f}", f"{facts['top1']:.2%}") if "kl" in facts else ())


def _tell_worst(facts: dict[str, Any]) -> None:
    for miss in facts.get("worst", ()):
        kl = f"KL {miss['kl']:7.3f}  " if "kl" in miss else ""
        said = f"likeliest [{miss['likeliest']}]" + (f", reference's [{miss['reference']}]" if "kl" in miss else "")
        console.answer(f"{kl}loss {miss['loss']:6.2f}  …{miss['before']}[{miss['token']}]  {said}")
