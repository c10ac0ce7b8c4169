"""A model's tokens and chat template: what is special, and whether conversations come out as they should."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import OnDeviceError
from ...runtime.template import ChatTemplate, encode_chat
from ...runtime.tokenizer import Tokenizer

USER = {"role": "user", "content": "alpha"}
ASSISTANT = {"role": "assistant", "content": "beta"}
AGAIN = {"role": "user", "content": "gamma"}
SYSTEM = {"role": "system", "content": "delta"}
TOOL = {"type": "function", "function": {"name": "epsilon", "description": "zeta", "parameters": {}}}


@dataclass(frozen=True)
class Tokens:
    """size: of the vocabulary. roles: bos, eos, … -> (id, text). stops: (id, text) of what ends an answer. special: how
    many there are."""

    size: int
    roles: Mapping[str, tuple[int, str]]
    stops: tuple[tuple[int, str], ...]
    special: int


@dataclass(frozen=True)
class Check:
    """One thing a chat template should do. ok None: it does not, and that is no fault."""

    name: str
    ok: bool | None
    note: str = ""


def tokens(tokenizer: Tokenizer, config_eos: Any = ()) -> Tokens:
    """config_eos: what generation_config.json names as ends."""
    named = [config_eos] if isinstance(config_eos, int) else config_eos or []
    stops = tokenizer.eos_ids | {i for i in named if isinstance(i, int)}
    texts = {id: tokenizer.piece(id) for id in (*stops, *tokenizer.named_ids.values())}
    return Tokens(
        tokenizer.vocab_size,
        {role: (id, texts[id]) for role, id in tokenizer.named_ids.items()},
        tuple((id, texts[id]) for id in sorted(stops)),
        len(tokenizer.special_ids),
    )


def check_template(tokenizer: Tokenizer, stops: frozenset[int]) -> list[Check]:
    """What the template makes of small conversations. [] where the model has none."""
    if not tokenizer.chat_template:
        return []
    try:
        template = ChatTemplate.of(tokenizer)
        asked = template.render([USER])
    except OnDeviceError as error:
        return [Check("renders a question", False, error.message)]
    checks = [Check("renders a question", "alpha" in asked, "" if "alpha" in asked else "the question is not in it")]
    checks.append(_opens_an_answer(template, asked))
    checks.append(_keeps(template, "several turns", [USER, ASSISTANT, AGAIN], ("alpha", "beta", "gamma")))
    checks.append(_keeps(template, "a system message", [SYSTEM, USER], ("alpha", "delta"), optional=True))
    checks.append(_keeps(template, "tools", [USER], ("alpha", "epsilon"), optional=True, tools=[TOOL]))
    checks.append(_ends_an_answer(tokenizer, template, stops))
    return checks


def _opens_an_answer(template: ChatTemplate, asked: str) -> Check:
    closed = template.render([USER], add_generation_prompt=False)
    opening = asked[len(closed) :] if asked.startswith(closed) else ""
    return Check("opens an answer", bool(opening) or None, repr(opening) if opening else "the same with and without")


def _keeps(
    template: ChatTemplate, what: str, messages: list, wanted: tuple[str, ...], optional: bool = False, **more: Any
) -> Check:
    try:
        rendered = template.render(messages, **more)
    except OnDeviceError as error:
        return Check(f"takes {what}", None if optional else False, error.message)
    lost = [word for word in wanted if word not in rendered]
    return Check(f"takes {what}", True if not lost else None if optional else False, "left out" if lost else "")


def _ends_an_answer(tokenizer: Tokenizer, template: ChatTemplate, stops: frozenset[int]) -> Check:
    """Whether what follows an answer's text in training is a token that generation stops at."""
    name = "an answer ends in a stop token"
    try:
        ids = encode_chat(tokenizer, template, [USER, ASSISTANT], add_generation_prompt=False)
    except OnDeviceError as error:
        return Check(name, False, error.message)
    text, after = "", None
    for id in ids:
        if "beta" in text and (id in tokenizer.special_ids or id in stops):
            after = id
            break
        text += tokenizer.decode([id], skip_special=False)
    if after is None:
        return Check(name, False, "no special token stands behind it")
    return Check(name, after in stops, tokenizer.piece(after))
