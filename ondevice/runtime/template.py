"""Chat templates: a conversation into the text, and the ids, that a model was trained on.

A template is a program from a stranger. It runs in jinja2's immutable sandbox, with bounds on its time, on what it writes
and on the operations that could eat the machine's memory in one go. Special tokens belong to the template: whatever looks
like one inside a message stays text.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from ..errors import BadFile, Unsupported
from .tokenizer import Tokenizer

SECONDS = 2.0  # for one rendering
CHARACTERS = 4_000_000  # written by one rendering, or made by one operation inside it
HINT = "The template came with the model: fetch it again, or use generate, which needs none."


class TemplateRefused(Exception):
    """The template itself says that these messages do not fit it, or it broke a bound."""


class _Generator(jinja2.compiler.CodeGenerator):
    """`a ~ b` goes through the environment too, where its length is seen."""

    def visit_Concat(self, node: jinja2.nodes.Concat, frame) -> None:
        self.write("environment.join_texts((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Operators that can make something huge out of two small things are weighed before they run."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def call_binop(self, context, operator: str, left, right):
        if operator == "%" and isinstance(left, str):
            raise TemplateRefused("it formats a string with %")
        if operator == "*":
            lengths = [len(x) if isinstance(x, (str, list, tuple)) else x for x in (left, right)]
            sized = any(isinstance(x, (str, list, tuple)) for x in (left, right))
            if sized and all(isinstance(n, int) for n in lengths) and lengths[0] * lengths[1] > CHARACTERS:
                raise TemplateRefused("it makes a text that is too long")
        if operator == "+" and isinstance(left, str):
            return self.join_texts((left, right)) if isinstance(right, str) else left + right
        if operator == "**" and (abs(left) > 1_000_000 or abs(right) > 64):
            raise TemplateRefused("it makes a number that is too large")
        return super().call_binop(context, operator, left, right)

    def join_texts(self, parts: Sequence) -> str:
        texts = [str(part) for part in parts]
        if sum(map(len, texts)) > CHARACTERS:
            raise TemplateRefused("it makes a text that is too long")
        return "".join(texts)

    def wrap_str_format(self, value):
        if super().wrap_str_format(value) is not None:
            raise TemplateRefused("it formats a string")

    def is_safe_attribute(self, obj, attr: str, value) -> bool:
        padding = isinstance(obj, str) and attr in ("center", "ljust", "rjust", "zfill", "expandtabs")
        return not padding and super().is_safe_attribute(obj, attr, value)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, which marks answers for training, renders what it holds."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise TemplateRefused(str(message))


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    indent = min(indent, 16) if isinstance(indent, int) else None
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
    environment.filters["tojson"] = _tojson
    for filter in ("center", "format", "wordwrap", "xmlattr", "pprint"):
        del environment.filters[filter]
    indent = environment.filters["indent"]
    environment.filters["indent"] = lambda text, width=4, *a, **k: indent(text, min(width, 64), *a, **k)
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda format: datetime.now().strftime(format[:256]),
    }
    return environment


class ChatTemplate:
    """One model's template. `source` is jinja2 as in tokenizer_config.json; tokens: what it may call bos_token, …"""

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None):
        self.source, self.tokens = source, dict(tokens or {})
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise BadFile(f"The model's chat template cannot be read: {error}.", HINT) from None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """Raises Unsupported when the model came without one."""
        if not tokenizer.chat_template:
            raise Unsupported(
                "This model has no chat template: it was not made for conversation.", "Use: ondevice generate"
            )
        tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        return cls(tokenizer.chat_template, tokens)

    def render(
        self, messages: Sequence[Mapping], add_generation_prompt: bool = True, tools: Sequence | None = None, **extra
    ) -> str:
        """messages: role and content. Raises BadFile when the template fails, refuses or never ends."""
        values = {**self.tokens, "messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            with _deadline(SECONDS):
                return _bounded(self._template.generate(**values, **extra))
        except TemplateRefused as error:
            raise BadFile(
                f"The model's chat template refuses: {error}.", "Change the messages to what it says."
            ) from None
        except TimeoutError:
            raise BadFile(f"The model's chat template did not end within {SECONDS:.0f} seconds.", HINT) from None
        except jinja2.sandbox.SecurityError as error:
            raise BadFile(f"The model's chat template reaches for what it may not have: {error}.", HINT) from None
        except Exception as error:  # a template can fail like any program
            raise BadFile(f"The model's chat template failed: {type(error).__name__}: {error}.", HINT) from None


def _bounded(pieces: Iterable[str]) -> str:
    found, length = [], 0
    for piece in pieces:
        length += len(piece)
        if length > CHARACTERS:
            raise TemplateRefused("it writes without end")
        found.append(piece)
    return "".join(found)


@contextmanager
def _deadline(seconds: float):
    """Raises TimeoutError inside Python code that runs for longer, loops without output included. A trace function sees
    every line of the compiled template: no signal, no thread, so it works wherever the caller runs."""
    until = time.monotonic() + seconds

    def check(frame, event, argument) -> Callable:
        if time.monotonic() > until:
            raise TimeoutError
        return check

    before = sys.gettrace()
    sys.settrace(check)
    try:
        yield
    finally:
        sys.settrace(before)


# ------------------------------------------------------------------------------------------------ messages into ids

OPEN, CLOSE = "\ue0f0", "\ue0f1"  # private-use characters around the number of a protected text


def encode_chat(tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Mapping], **extra) -> list[int]:
    """The rendered conversation as ids: the template's special tokens are tokens, those inside messages stay text."""
    special = sorted(_special_texts(tokenizer), key=len, reverse=True)
    rendered = template.render(_map_texts(messages, lambda text: _protect(text, special)), **extra)
    ids: list[int] = []
    for part, protected in _parts(rendered, special):
        ids += tokenizer.encode(part, add_special=False, parse_special=not protected)
    return ids


def _special_texts(tokenizer: Tokenizer) -> list[str]:
    return [text for id in tokenizer.special_ids if (text := tokenizer.bytes_of(id).decode("utf-8", "replace"))]


def _map_texts(value, change: Callable[[str], str]):
    """Every text inside messages, however deep, through `change`; roles and names of fields are left alone."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {k: v if k == "role" else _map_texts(v, change) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_texts(v, change) for v in value]
    return value


def _protect(text: str, special: Sequence[str]) -> str:
    text = text.replace(OPEN, "").replace(CLOSE, "") if OPEN in text or CLOSE in text else text
    for number, token in enumerate(special):
        text = text.replace(token, f"{OPEN}{number}{CLOSE}")
    return text


def _parts(rendered: str, special: Sequence[str]):
    """(text, is it protected) in order."""
    head, *rest = rendered.split(OPEN)
    if head:
        yield head, False
    for part in rest:
        number, _, tail = part.partition(CLOSE)
        yield special[int(number)], True
        if tail:
            yield tail, False
