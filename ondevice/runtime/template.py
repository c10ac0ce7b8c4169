"""Chat templates: a conversation into the text, and the ids, that a model was trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from ..errors import BadFile, OnDeviceError, Unsupported
from .sandbox import Exceeded, Refused, Sandbox
from .tokenizer import Tokenizer

HINT = "It came with the model: fetch the model again, or use generate without --chat, which needs none."


class ChatTemplate:
    """One model's template. Safe to use from several threads.

    source: jinja2, as in tokenizer_config.json. tokens: what it may call bos_token, eos_token, …
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None):
        """Raises BadFile where it is no template."""
        self.source, self.tokens = source, dict(tokens or {})
        self._sandbox = Sandbox()
        try:
            self._template = self._sandbox.compiled(source)
        except Exception as error:  # a template can break the compiler in any way
            raise _told(error) from None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """The template that came with a tokenizer. Raises Unsupported where none did."""
        if not tokenizer.chat_template:
            raise Unsupported(
                "This model has no chat template: it was not made for conversation.",
                "Use generate without --chat, which continues a text as it is.",
            )
        tokens = {f"{role}_token": tokenizer.named(role) for role in tokenizer.named_ids}
        return cls(tokenizer.chat_template, tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        **extra: Any,
    ) -> str:
        """The conversation as text. messages: role and content, and what else the template knows; extra: its other
        variables, such as enable_thinking.

        Raises Unsupported where the template says that it can't serve these messages, BadFile where it fails, loops,
        makes too much text or reaches for what it may not have.
        """
        given = {
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._sandbox.run(self._template, self.tokens | given | extra)
        except Exception as error:  # a template can fail like any program
            raise _told(error) from None


def _told(error: Exception) -> OnDeviceError:
    """What a template raised, for people."""
    if isinstance(error, Refused):
        return Unsupported(f"The model's chat template refuses: {_line(error)}.", "Change the messages accordingly.")
    if isinstance(error, Exceeded):
        return BadFile(f"The model's chat template is stopped: {_line(error)}.", HINT)
    if isinstance(error, jinja2.TemplateSyntaxError):
        return BadFile(f"The model's chat template is wrong in line {error.lineno}: {_line(error.message)}.", HINT)
    if isinstance(error, jinja2.sandbox.SecurityError):
        return BadFile(f"The model's chat template reaches for what it may not have: {_line(error)}.", HINT)
    return BadFile(f"The model's chat template fails: {type(error).__name__}: {_line(error)}.", HINT)


def _line(error: object) -> str:
    return (" ".join(str(error).split()) or "no reason given").rstrip(".")[:300]


# ---------------------------------------------------------------------------------------------- messages into ids


def encode_chat(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Mapping[str, Any]], **options: Any
) -> list[int]:
    """The rendered conversation as ids. options: as `ChatTemplate.render` takes them.

    Special tokens belong to the template: whatever looks like one inside a message or a tool stays text. Where none
    does, the ids are those of the rendered text as it is. Raises what `render` raises.
    """
    masks = Masks(tokenizer.special_texts, [messages, options])
    rendered = template.render(masks.hide(messages), **masks.hide(options))
    if not masks.used:
        return tokenizer.encode(rendered, add_special=False)
    ids: list[int] = []
    for part in tokenizer.partition(rendered):
        if isinstance(part, int):
            ids.append(part)
        else:
            ids += tokenizer.encode_plain(masks.reveal(part), start=not ids)
    return ids


class Masks:
    """Puts one private-use character in the place of each special token's text inside messages, so that the template
    can do with it what it does with text (trim, split, measure, put into JSON), and takes it away again afterwards.

    Also the beginning of a special token at the end of a text is masked: the next text could complete it.
    """

    def __init__(self, special: frozenset[str], given: Any):
        """given: all that will be hidden; no character that occurs in it becomes a mask."""
        special = sorted((text for text in special if text.strip()), key=lambda text: -len(text))
        heads = sorted({text[:n] for text in special for n in range(1, len(text))}, key=lambda text: -len(text))
        whole, head = ("|".join(map(re.escape, texts)) or "(?!)" for texts in (special, heads))
        self._pattern = re.compile(rf"{whole}|(?:{head})\Z")
        self._taken = set(json.dumps(given, ensure_ascii=False, default=str))
        self._masks: dict[str, str] = {}

    @property
    def used(self) -> bool:
        return bool(self._masks)

    def hide(self, value: Any) -> Any:
        """Every text inside, however deep; the names of fields are left alone."""
        if isinstance(value, str):
            return self._pattern.sub(lambda found: self._mask(found[0]), value)
        if isinstance(value, Mapping):
            return {key: self.hide(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide(inner) for inner in value]
        return value

    def reveal(self, text: str) -> str:
        """The special tokens' texts again; in JSON that escapes what isn't ASCII, too."""
        for hidden, mask in self._masks.items():
            text = text.replace(mask, hidden).replace(json.dumps(mask)[1:-1], json.dumps(hidden)[1:-1])
        return text

    def _mask(self, text: str) -> str:
        if text not in self._masks:
            free = (chr(code) for code in range(0xF0000, 0x110000) if chr(code) not in self._taken)
            mask = next(free)
            self._taken.add(mask)
            self._masks[text] = mask
        return self._masks[text]
