"""`ondevice eval MODEL --text FILE`: perplexity, and how far a model is from a reference."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from . import console
from .model_options import model_argument, runtime_options


@click.command("eval")
@model_argument
@click.option("--text", "text_file", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--against", metavar="REFERENCE", help="A model to compare with; it always runs exact.")
@click.option("--window", "--context", "window", default=512, show_default=True, help="Tokens a window.")
@click.option("--tokens", type=click.IntRange(2), help="Only the first N tokens of the text.")
@runtime_options(context=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(model, text_file, against, window, tokens, backend, exact, threads, as_json):
    """How well MODEL predicts a text: perplexity; with --against also the mean KL divergence from a reference's
    predictions and how often both find the same token likeliest."""
    from ..errors import BadFile
    from ..runtime.session import open_session
    from ..tools.evaluate.text import Evaluation, evaluate

    try:
        text = text_file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BadFile(f"{text_file} is not UTF-8 text.", "Convert it first: iconv -t utf-8.") from None
    options = {"backend": backend, "threads": threads}
    with open_session(model, exact=exact, **options) as session:
        reference = open_session(against, exact=True, **options) if against else None
        with console.progress("Scoring", unit="windows") as progress:
            for event in evaluate(session, text, window, tokens, reference):
                if isinstance(event, Evaluation):
                    result = event
                else:
                    progress.update(event.done, event.total)
        facts = {"model": model, "against": against, "backend": session.backend.name, "exact": exact, "context": window}
    if as_json:
        console.json(facts | {k: v for k, v in asdict(result).items() if v is not None})
        return
    console.answer(f"perplexity  {result.perplexity:.4f}   ({result.scored} predictions in {result.tokens} tokens)")
    if against:
        console.answer(f"reference   {result.reference_perplexity:.4f}")
        console.answer(f"KL          {result.kl:.6f} nats a token")
        console.answer(f"same top-1  {result.top1:.2%}")
