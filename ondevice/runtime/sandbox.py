"""A stranger's jinja2 template, run with bounds on what it reaches, how long it runs and how much it makes.

jinja2's immutable sandbox keeps a template from reaching Python. It does not keep it from looping for hours or from
filling the memory, so every loop, call, comparison and everything that makes a value reports to a `Meter` here: the
template's syntax tree is rewritten to do so. No signal, thread or tracing is needed, and it works in any thread.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes as nodes
import jinja2.sandbox
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

SECONDS = 2.0  # of the thread's own: a busy machine, or a process that was stopped, is no fault of the template's
LARGEST = 8_000_000  # characters, or entries of nested lists, of one value; a long conversation has a tenth of it
TOTAL = 100_000_000  # of all values made by one rendering
MAX_SOURCE = 100_000  # characters; the longest published templates have a third of it
MAX_BITS = 4096  # of an integer
ENTRY = 16  # what an entry of a list or dict weighs, in characters
NESTED = (list, tuple, dict, set)

UNBOUNDED = ("center", "format", "wordwrap", "xmlattr", "pprint", "urlize", "filesizeformat", "slice", "batch", "round",
             "sum", "random")  # fmt: skip
TEXT_METHODS = (
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal",
    "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip", "partition",
    "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split",
    "splitlines", "startswith", "strip", "swapcase", "title", "upper",
)  # fmt: skip
METHODS: dict[type, tuple[str, ...]] = {  # all others could make something huge, or change what they are called on
    str: TEXT_METHODS,
    dict: ("get", "items", "keys", "values"),
    list: ("count", "index"),
    tuple: ("count", "index"),
    int: (),
    float: ("is_integer",),
    bytes: (),
}


class Refused(Exception):
    """The template says itself that it can't serve these messages; its words."""


class Exceeded(Exception):
    """The template went beyond a bound; which."""


@dataclass
class Meter:
    """What one rendering may still do."""

    until: float = field(default_factory=lambda: time.thread_time() + SECONDS)
    left: int = TOTAL

    def tick(self) -> None:
        if time.thread_time() > self.until:
            raise Exceeded(f"it did not end within {SECONDS:.0f} seconds")

    def reserve(self, size: int) -> None:
        """Before something of this size is made."""
        self.tick()
        self.left -= size
        if size > LARGEST or self.left < 0:
            raise Exceeded("it makes too much text")

    def spend(self, value: Any) -> Any:
        """After something was made, perhaps of older things."""
        self.reserve(len(value) if isinstance(value, str) else ENTRY * len(value) if isinstance(value, NESTED) else 1)
        return value

    def build(self, value: Any) -> Any:
        """After something was made that may hold one thing many times over, and so on: text of it, or a comparison,
        would be endless."""
        if isinstance(value, NESTED) and _weigh(value) > LARGEST:
            raise Exceeded("it makes too large a value")
        return self.spend(value)


_METER: ContextVar[Meter] = ContextVar("meter")


def _weigh(value: Any) -> int:
    """Characters and entries, shared ones as often as they are reached."""
    total, waiting = 0, [value]
    while waiting and total <= LARGEST:
        value = waiting.pop()
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, NESTED):
            total += ENTRY * len(value)
            waiting += [*value.keys(), *value.values()] if isinstance(value, dict) else value
        total += 1
    return total


class _Counted:
    """An iterable whose every step is counted."""

    def __init__(self, values: Any):
        self._values = values

    def __iter__(self) -> Iterator[Any]:
        meter = _METER.get()
        for value in self._values:
            meter.tick()
            yield value

    def __len__(self) -> int:
        return len(self._values)


class _Metered(NodeTransformer):
    """Lets the meter see each loop, and each value that isn't just looked up."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _through("counted", node.iter)
        return node

    def _spent(self, node: nodes.Expr) -> nodes.Node:
        return _through("spent", self.generic_visit(node))

    def _built(self, node: nodes.Expr) -> nodes.Node:
        return _through("built", self.generic_visit(node))

    visit_Compare = visit_Test = _spent
    visit_Filter = visit_List = visit_Dict = _built

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._built(node) if node.ctx == "load" else self.generic_visit(node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        return self._spent(node) if isinstance(node.arg, nodes.Slice) else self.generic_visit(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through("joined", nodes.List(node.nodes, lineno=node.lineno))

    def visit_NSRef(self, node: nodes.NSRef) -> nodes.Node:
        _check_names([node.attr])
        return node


def _through(name: str, node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, f" {name}", [], [], None, None, lineno=node.lineno)  # no template can spell these names


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks answers, for training; it renders what it holds."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """What chat templates on the Hub expect of their environment, within bounds."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            optimized=False,  # nothing of a template runs before it is rendered
            finalize=lambda value: value if isinstance(value, str) else _METER.get().build(value),
        )
        for name in UNBOUNDED:
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters |= FILTERS
        self.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now, "namespace": _namespace}

    def compiled(self, source: str) -> jinja2.Template:
        """Raises Exceeded, jinja2.TemplateError, RecursionError and whatever Python's own compiler raises."""
        if len(source) > MAX_SOURCE:
            raise Exceeded(f"it has {len(source)} characters")
        tree = _Metered().visit(self.parse(source))
        tree.set_environment(self)
        return self.from_string(tree)

    def run(self, template: jinja2.Template, values: Mapping[str, Any]) -> str:
        """Raises Refused, Exceeded, and whatever a template can raise."""
        token = _METER.set(Meter())
        try:
            return self.concat(template.generate(values))
        finally:
            _METER.reset(token)

    @staticmethod
    def concat(parts: Any) -> str:
        kept = list(parts)
        _METER.get().reserve(sum(map(len, kept)))
        return "".join(kept)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        allowed = next((METHODS[kind] for kind in METHODS if isinstance(obj, kind)), None)
        return (allowed is None or attr in allowed) and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise jinja2.sandbox.SecurityError(f"the attribute {attribute} of a {type(obj).__name__}")

    def wrap_str_format(self, value: Any) -> None:
        if super().wrap_str_format(value) is not None:
            raise jinja2.sandbox.SecurityError("the method format of a str")

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter, owner = _METER.get(), getattr(__obj, "__self__", None)
        if isinstance(owner, str) and __obj.__name__ == "replace":
            return _replace(owner, *args)
        if isinstance(owner, str) and __obj.__name__ == "join":
            return _join_texts(owner, *args)
        meter.tick()
        return meter.build(super().call(__context, __obj, *args, **kwargs))

    def call_filter(self, *args: Any, **kwargs: Any) -> Any:
        return _METER.get().build(super().call_filter(*args, **kwargs))

    def call_test(self, *args: Any, **kwargs: Any) -> Any:
        return _METER.get().spend(super().call_test(*args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sized = [isinstance(side, (str, list, tuple)) for side in (left, right)]
        if operator == "%" and sized[0]:
            raise Exceeded("it formats text with %")
        if operator == "+" and all(sized):
            _METER.get().reserve(len(left) + len(right))
        elif operator == "*" and any(sized):
            sizes = [len(side) if is_sized else side for side, is_sized in zip((left, right), sized, strict=True)]
            _METER.get().reserve(max(int(sizes[0]), 0) * max(int(sizes[1]), 0))
        elif operator in ("*", "**"):
            _check_number(operator, left, right)
        return _METER.get().build(super().call_binop(context, operator, left, right))


def _check_number(operator: str, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * abs(right)
        if bits > MAX_BITS:
            raise Exceeded("it makes a number that is too large")


def _check_names(names: Any) -> None:
    if any(str(name).startswith("_") for name in names):
        raise jinja2.sandbox.SecurityError("a namespace can't have names that begin with _")


# -------------------------------------------------------------------------------------- functions and filters


def _refuse(message: Any) -> None:
    raise Refused(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format[:256])


def _namespace(*values: Any, **named: Any) -> Namespace:
    found = dict(*values, **named)
    _check_names(found)
    return Namespace(found)


@jinja2.pass_context
def _counted(context: Any, values: Any) -> _Counted:
    return _Counted(values)


@jinja2.pass_context
def _spent(context: Any, value: Any) -> Any:
    return _METER.get().spend(value)


@jinja2.pass_context
def _built(context: Any, value: Any) -> Any:
    return _METER.get().build(value)


@jinja2.pass_context
def _joined(context: Any, parts: list[Any]) -> str:
    return _join_texts("", parts, str)


def _join_texts(separator: str, values: Any, spell: Callable[[Any], str] = lambda value: value) -> str:
    meter, texts = _METER.get(), []
    for value in values:
        text = spell(meter.build(value))
        texts.append(text)
        meter.reserve(len(separator))
    if sum(map(len, texts)) + len(separator) * len(texts) > LARGEST:
        raise Exceeded("it makes too much text")
    return separator.join(texts)


@jinja2.pass_eval_context
def _join(context: Any, values: Any, d: Any = "", attribute: Any = None) -> str:
    if attribute is not None:
        values = map(jinja2.filters.make_attrgetter(context.environment, attribute), values)
    return _join_texts(str(d), values, str)


def _replace(text: Any, old: str, new: str, count: Any = -1) -> str:
    text, old, new, count = str(text), str(old), str(new), -1 if count is None else count
    found = text.count(old) if count < 0 else min(text.count(old), count)
    _METER.get().reserve(len(text) + found * len(new))
    return text.replace(old, new, count)


def _indent(text: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    _METER.get().reserve((str(text).count("\n") + 1) * (len(width) if isinstance(width, str) else max(width, 0)))
    return jinja2.filters.do_indent(text, width, first, blank)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    _METER.get().build(value)
    if (isinstance(indent, int) and indent > 64) or len(re.sub(r"\s", "", f"{indent}{separators}")) > 64:
        raise Exceeded("it spreads JSON too far")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


FILTERS: dict[str, Callable] = {
    " counted": _counted,
    " spent": _spent,
    " built": _built,
    " joined": _joined,
    "join": _join,
    "replace": _replace,
    "indent": _indent,
    "tojson": _tojson,
}
