"""`ondevice explain MODEL "text"`: how a model reads a text and arrives at the next token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import console
from .model_options import adapter_option, model_argument, open_model, runtime_options

if TYPE_CHECKING:
    from ..tools.explain import Explanation
    from ..tools.explain.explaining import Neighbour

BAR = 30  # characters of a probability of 1
MOST_NEAR = 12  # different tokens whose neighbours are listed in the terminal


@click.command("explain")
@model_argument
@click.argument("text")
@click.option("--word", metavar="WORD", help="Look closely at this word, wherever it stands; default: the last token.")
@click.option("--chat", is_flag=True, help="TEXT is a message: the model's chat template is put around it.")
@click.option("--top", type=click.IntRange(1, 100), default=10, show_default=True, help="Next tokens to list.")
@click.option(
    "--language", type=click.Choice(["en", "pt"]), default="en", show_default=True, help="Of the words around."
)
@click.option("--html", "page", type=click.Path(dir_okay=False, path_type=Path), help="Write a page to explore.")
@adapter_option()
@runtime_options(context=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(model, text, word, chat, top, language, page, as_json, adapters, backend, exact, threads):
    """How MODEL reads TEXT: its tokens, the likeliest next ones, how that prediction forms layer by layer, which
    earlier tokens each looks at, and which tokens mean nearly the same to it."""
    from ..errors import BadOption
    from ..tools.explain import Progress, explain, positions_of

    if page and not page.parent.is_dir():
        raise BadOption(f"There is no folder {page.parent} for {page.name}.", "Make it first, or give another place.")
    options = {"backend": backend, "exact": exact, "threads": threads, "adapters": adapters}
    with open_model(model, **options) as session, console.progress("Looking", unit="layers") as progress:
        ids = session.encode_messages([{"role": "user", "content": text}]) if chat else session.encode_prompt(text)
        focus = positions_of(session.tokenizer, ids, word) if word is not None else ()
        for event in explain(session, ids, focus, top):
            if isinstance(event, Progress):
                progress.update(event.done, event.total)
            else:
                found = event
    if page:
        from ..checkpoint.write import write_file
        from ..tools.explain.page import html

        write_file(page, html(found, model, language).encode())
        console.status(f"Written: {page}")
    if as_json:
        console.json({"model": model, "text": text} | _facts(found))
    elif not page:
        _show(found, language)


def _facts(found: Explanation) -> dict[str, Any]:
    lens = found.lens
    return {
        "tokens": [vars(token) for token in found.tokens],
        "next": [vars(guess) for guess in found.next],
        "lens": {
            "first": lens.first,
            "chance": lens.chance.tolist(),
            "rank": lens.rank.tolist(),
            "guesses": [[[vars(guess) for guess in place] for place in stage] for stage in lens.guesses],
        },
        "focus": [
            {
                "position": at,
                "looks": found.looks(at).tolist(),
                "attention": {layer: heads[:, at, : at + 1].tolist() for layer, heads in found.attention.items()},
            }
            for at in found.focus
        ],
        "likeness": found.likeness.tolist(),
        "neighbours": {id: [vars(n) for n in near] for id, near in found.neighbours.items()},
    }


def _show(found: Explanation, language: str) -> None:
    from ..tools.explain.glossary import DOCS, TERMS, WORDS
    from ..tools.explain.numbers import percent

    words = WORDS[language]
    console.heading(words["tokens"])
    console.answer(words["tokens_note"].format(count=len(found.tokens)))
    console.answer(" ".join(f"{_quoted(t.text)} {t.id}" for t in found.tokens))
    console.heading(words["next"])
    for guess in found.next:
        bar = "█" * round(BAR * guess.probability)
        console.answer(f"{percent(guess.probability, language, 2):>7}  {_quoted(guess.text):16} {guess.id:>7}  {bar}")
    _show_lens(found, language)
    _show_attention(found, language)
    _show_likeness(found, language)
    console.heading(words["near"])
    console.answer(words["near_note"])
    names = {t.id: t.text for t in found.tokens}
    looked_at = [found.tokens[at].id for at in found.focus]
    order = list(dict.fromkeys([*looked_at, *reversed(found.neighbours)]))[:MOST_NEAR]
    console.table([(_quoted(names[id]), _near(found.neighbours[id], language)) for id in order])
    console.heading(words["glossary"])
    for term in TERMS.values():
        console.answer(f"{term[language].word}: {term[language].meaning}")
    console.answer(words["more"].format(docs=DOCS[language]))


def _show_lens(found: Explanation, language: str) -> None:
    """Of the last token: stage by stage."""
    from ..tools.explain.glossary import WORDS
    from ..tools.explain.numbers import percent

    words = WORDS[language]
    lens, answer = found.lens, found.next[0]
    console.heading(words["lens"])
    console.answer(words["lens_note"].format(token=_quoted(found.tokens[-1].text), answer=_quoted(answer.text)))
    rows = []
    for stage, places in enumerate(lens.guesses):
        said = "  ".join(f"{_quoted(g.text)} {percent(g.probability, language, 0)}" for g in places[-1])
        name = words["stage0"] if stage == 0 else f"{words['layer']} {stage - 1}"
        rows.append((name, percent(lens.chance[stage, -1], language), str(lens.rank[stage, -1] + 1), said))
    console.table(rows, ("", words["answer"], words["rank"], ""))


def _show_attention(found: Explanation, language: str) -> None:
    from ..tools.explain.glossary import WORDS
    from ..tools.explain.numbers import percent

    words = WORDS[language]
    console.heading(words["attention"])
    if not found.attention:
        console.answer(words["no_attention"])
        return
    for at in found.focus:
        console.answer(words["attention_note"].format(token=_named(found, at)))
        looks = found.looks(at)
        most = max(looks[1:].max(initial=0.0), 1e-6)
        shades = [min(float(share / most), 1.0) for share in looks]
        console.shaded([(t.text, shade) for t, shade in zip(found.tokens, shades, strict=True)])
        best = sorted(range(at + 1), key=lambda i: -looks[i])[:6]
        console.answer("  " + "; ".join(f"{_named(found, i)} {percent(looks[i], language)}" for i in best))
        console.answer(f"  {words['heads_note']}")
        for layer, head, token, share in found.heads(at):
            where = words["head_row"].format(layer=layer, head=head)
            console.answer(f"    {where}: {_named(found, token)} {percent(share, language, 0)}")


def _show_likeness(found: Explanation, language: str) -> None:
    """How two places of one word grow apart."""
    from ..tools.explain.glossary import WORDS
    from ..tools.explain.numbers import decimal

    words = WORDS[language]
    if len(found.focus) < 2:
        return
    console.heading(words["likeness"])
    for column, at in enumerate(found.focus[1:], 1):
        first, other = _named(found, found.focus[0]), _named(found, at)
        console.answer(words["likeness_note"].format(first=first, other=other))
        console.answer("  " + " ".join(decimal(cosine, language) for cosine in found.likeness[:, column]))


def _near(neighbours: Sequence[Neighbour], language: str) -> str:
    from ..tools.explain.numbers import decimal

    return " ".join(f"{_quoted(n.text)} {decimal(n.cosine, language)}" for n in neighbours)


def _named(found: Explanation, at: int) -> str:
    """A token with its place, where it stands more than once."""
    text = found.tokens[at].text
    alike = [i for i, token in enumerate(found.tokens) if token.text == text]
    return _quoted(text) if len(alike) == 1 else f"{_quoted(text)}[{at}]"


def _quoted(text: str) -> str:
    """Spaces belong to tokens: shown."""
    return text.replace(" ", "·")
