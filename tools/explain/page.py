"""An explanation as one page: everything in it, nothing fetched, to be kept or sent. Readable without its script, which
adds what one can point at."""

from __future__ import annotations

import base64
import json
from html import escape
from pathlib import Path
from string import Template

import numpy as np

from .explaining import Explanation, Token
from .glossary import DOCS, TERMS, WORDS, anchor
from .numbers import MARKS, decimal, percent

MOST_SHARES = 3_000_000  # bytes of attention in a page; beyond that a layer's heads are averaged
MARKED = {  # a section's heading -> the terms that it links to
    "tokens": ("token", "id"), "next": ("logit", "probability"), "lens": ("lens", "layer", "stream"),
    "attention": ("attention", "head", "sink"), "near": ("embedding", "cosine"), "likeness": ("stream", "cosine"),
}  # fmt: skip


def html(found: Explanation, model: str, language: str) -> str:
    """The whole page. language: en or pt."""
    words = WORDS[language]
    sections = [_tokens(found, language), _next(found, language), _lens(found, language), _near(words)]
    if len(found.focus) > 1:
        sections.append(_likeness(found, language))
    page = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    return page.substitute(
        lang=language,
        title=escape(f"{Path(model).name}: {words['explained']}"),
        sections="\n".join(_section(*section, language) for section in sections) + "\n" + _glossary(language),
        data=json.dumps(_data(found, language), ensure_ascii=True).replace("<", "\\u003c"),
    )


def _section(name: str, note: str, body: str, language: str) -> str:
    """One part, with the terms that it is about."""
    title, links = WORDS[language][name], _links(name, language)
    return f'<section id="{name}"><h2>{title}</h2>\n<p>{note} {links}</p>\n{body}</section>'


def _links(name: str, language: str) -> str:
    return f"<small>{' · '.join(_link(key, language) for key in MARKED[name])}</small>"


def _link(key: str, language: str) -> str:
    term = TERMS[key][language]
    return f'<a href="#g-{anchor(term.word)}" title="{escape(term.meaning)}">{escape(term.word)}</a>'


def _glossary(language: str) -> str:
    words, terms = WORDS[language], [term[language] for term in TERMS.values()]
    listed = "\n".join(f'<dt id="g-{anchor(t.word)}">{escape(t.word)}</dt><dd>{escape(t.meaning)}</dd>' for t in terms)
    more = words["more"].format(docs=f"<code>{DOCS[language]}</code>")
    return f'<section id="glossary"><h2>{words["glossary"]}</h2>\n<dl>{listed}</dl>\n<p>{more}</p></section>'


Section = tuple[str, str, str]  # name, note, body


def _tokens(found: Explanation, language: str) -> Section:
    """Tokens and attention are one section: the text is what one points at."""
    words, chips = WORDS[language], "".join(map(_chip, found.tokens))
    note = words["tokens_note"].format(count=len(found.tokens))
    if not found.attention:
        without = f"<p>{words['no_attention']}</p>{_controls(words, 'hidden')}"
        return "tokens", note, f'<div class="tokens">{chips}</div>{without}'
    touch = f"<p><b>{words['attention']}.</b> {words['touch']} {_links('attention', language)}</p>"
    return "tokens", note, f'<div class="tokens sticky">{chips}</div>{touch}{_controls(words)}'


def _chip(token: Token) -> str:
    kind = "token special" if token.special else "token"
    return f'<button class="{kind}" type="button">{_shown(token.text)}<small>{token.id}</small></button>'


def _controls(words: dict[str, str], hidden: str = "") -> str:
    menus = {"layer": "layer", "heads": "head"}
    choices = "".join(f'<label>{words[name]} <select id="{id}"></select></label>' for name, id in menus.items())
    drawn = '<p><code id="looks"></code></p><div class="wide"><svg id="grid" role="img"></svg></div>'
    return f'<div {hidden}><div class="controls">{choices}</div>{drawn}</div>'


def _next(found: Explanation, language: str) -> Section:
    most = found.next[0].probability
    bars = "".join(
        f"<code>{_shown(g.text)}</code><span>{percent(g.probability, language)}</span>"
        f'<div class="bar" style="width:{100 * g.probability / most:.1f}%"></div>'
        for g in found.next
    )
    return "next", WORDS[language]["next_note"], f'<div class="bars">{bars}</div>'


def _lens(found: Explanation, language: str) -> Section:
    """The likeliest token of every stage at every place."""
    lens, words = found.lens, WORDS[language]
    places = range(lens.first, len(found.tokens))
    head = "".join(f'<th data-at="{at}">{_shown(found.tokens[at].text)}</th>' for at in places)
    rows = []
    for stage in reversed(range(len(lens.guesses))):
        name = words["stage0"] if stage == 0 else f"{words['layer']} {stage - 1}"
        cells = []
        for at, place, final in zip(places, lens.guesses[stage], lens.guesses[-1], strict=True):
            said = escape("\n".join(f"{g.text} {percent(g.probability, language)}" for g in place))
            same = ' class="same"' if place[0].id == final[0].id else ""
            style = f"--share:{0.75 * place[0].probability:.2f}"
            cells.append(f'<td data-at="{at}"{same} style="{style}" title="{said}">{_shown(place[0].text)}</td>')
        rows.append(f"<tr><th>{name}</th>{''.join(cells)}</tr>")
    note = words["lens_note"].format(
        token=f"<code>{_shown(found.tokens[-1].text)}</code>", answer=f"<code>{_shown(found.next[0].text)}</code>"
    )
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return "lens", note, f'<svg id="chart" viewBox="0 0 600 120" role="img"></svg><div class="wide">{table}</div>'


def _near(words: dict[str, str]) -> Section:
    return "near", words["near_note"], '<div class="bars" id="nearest"></div>'


def _likeness(found: Explanation, language: str) -> Section:
    """Cosines by stage, a curve for each further place of the word."""
    words, stages = WORDS[language], len(found.likeness)
    step, curves = 560 / max(stages - 1, 1), []
    for cosines in found.likeness.T[1:]:
        points = " ".join(f"{30 + i * step:.1f},{10 + 110 * (1 - max(c, 0)):.1f}" for i, c in enumerate(cosines))
        curves.append(f'<polyline class="curve" points="{points}"/>')
    axes = "".join(
        f'<line class="grid" x1="30" x2="590" y1="{y}" y2="{y}"/><text x="0" y="{y + 4}">{label}</text>'
        for y, label in ((10, "1"), (65, decimal(0.5, language, 1)), (120, "0"))
    )
    last = f"{words['layer']} {stages - 2}"
    ends = f'<text x="30" y="136">{words["stage0"]}</text><text x="590" y="136" text-anchor="end">{last}</text>'
    named = [f"<code>{_shown(found.tokens[at].text)}</code> ({at})" for at in found.focus]
    note = words["likeness_note"].format(first=named[0], other=", ".join(named[1:]))
    return "likeness", note, f'<svg viewBox="0 0 600 140" role="img">{axes}{"".join(curves)}{ends}</svg>'


def _shown(text: str) -> str:
    """Spaces belong to tokens: shown."""
    return escape(text.replace(" ", "·"))


def _data(found: Explanation, language: str) -> dict:
    """What the script needs; probabilities to four places."""
    return {
        "tokens": [{"id": t.id, "text": t.text} for t in found.tokens],
        "focus": found.focus,
        "first": found.lens.first,
        "chance": np.round(found.lens.chance, 4).tolist(),
        "guesses": [
            [[[g.id, g.text, round(g.probability, 4)] for g in place] for place in stage]
            for stage in found.lens.guesses
        ],
        "attention": _packed(found.attention),
        "near": {id: [[n.text, round(n.cosine, 4)] for n in near] for id, near in found.neighbours.items()},
        "words": WORDS[language],
        "mark": MARKS[language],
    }


def _packed(attention: dict[int, np.ndarray]) -> dict:
    """Shares in steps of 1/255, base64: by layer, head and row, each row up to its own token."""
    tokens = next((by_head.shape[-1] for by_head in attention.values()), 0)
    lower = np.tril_indices(tokens)
    size = sum(len(by_head) for by_head in attention.values()) * len(lower[0])
    kept = attention if size <= MOST_SHARES else {i: a.mean(0, keepdims=True) for i, a in attention.items()}
    octets = [np.rint(255 * by_head[:, lower[0], lower[1]]).astype(np.uint8).tobytes() for by_head in kept.values()]
    shares = base64.b64encode(b"".join(octets)).decode()
    return {"layers": list(kept), "heads": [len(by_head) for by_head in kept.values()], "shares": shares}
