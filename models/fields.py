"""Values of a config.json, checked: each is what it must be, or an error says which is not.

Every reader takes the config and a key. A key that is missing or null gives `default`; without a default it is an
error. GGUF's metadata come here too, translated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ..errors import BadFile, Unsupported

T = TypeVar("T")
MOST = (1 << 31) - 1  # sizes and positions are int32
MOST_LAYERS = 10_000  # far beyond any model, and still a list that fits in memory
MOST_HEAD_DIM = 1 << 16


def contradiction(what: str) -> BadFile:
    """A config that cannot be true."""
    return BadFile(what, "Fetch the model again, or correct its config.")


def _value(hf: Mapping, key: str, default: Any, needed: str, good: Callable[[Any], bool]) -> Any:
    value = hf.get(key)
    if value is None and default is not None:
        return default
    if not good(value):
        shown = "no " + key if value is None else f"{key} = {value!r:.60}"
        raise contradiction(f"The config has {shown}; {needed} is needed.")
    return value


def whole(hf: Mapping, key: str, default: int | None = None, least: int = 1, most: int = MOST) -> int:
    """A size or count: least … most."""
    needed = f"a whole number from {least} to {most}"
    return _value(hf, key, default, needed, lambda v: type(v) is int and least <= v <= most)


def number(hf: Mapping, key: str, default: float | None = None, least: float = 1e-30) -> float:
    """A positive number (or, with `least` 0, none), well within float32."""
    needed = "a positive number" if least else "a number, 0 or more,"
    return float(_value(hf, key, default, needed, lambda v: _is_number(v) and least <= v < 1e30))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def numbers(hf: Mapping, key: str) -> Sequence[float]:
    """A list of positive numbers."""
    return _value(hf, key, None, "a list of positive numbers", lambda v: (
        isinstance(v, list) and all(_is_number(i) and 1e-30 < i < 1e30 for i in v)
    ))  # fmt: skip


def flag(hf: Mapping, key: str, default: bool = False) -> bool:
    return _value(hf, key, default, "true or false", lambda v: type(v) is bool)


def table(hf: Mapping, key: str) -> Mapping:
    """An object within the config, {} where there is none."""
    return _value(hf, key, {}, "an object", lambda v: isinstance(v, Mapping))


def several(hf: Mapping, key: str, kind: type) -> Sequence:
    """A list of values of one type, () where there is none."""
    plural = {int: "a list of whole numbers", str: "a list of words", bool: "a list of true and false"}[kind]
    return _value(hf, key, (), plural, lambda v: isinstance(v, list) and all(type(i) is kind for i in v))


def optional(read: Callable[[Mapping, str], T], hf: Mapping, key: str) -> T | None:
    """What `read` makes of a key; None where it is missing or null."""
    return None if hf.get(key) is None else read(hf, key)


def one_of(hf: Mapping, key: str, known: Mapping[str, T], default: str) -> T:
    """What `known` has for a word. Raises Unsupported, naming those that are known."""
    word = _value(hf, key, default, "a word", lambda v: type(v) is str)
    if word not in known:
        raise Unsupported(
            f"The config asks for {key} = {word!r:.60}, which is not known here.", f"Known: {', '.join(sorted(known))}."
        )
    return known[word]


ACTIVATIONS = {  # Hugging Face's names -> the contract's
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "gelu_python": "gelu", "relu": "relu", "relu2": "relu2",
}  # fmt: skip


def activation(hf: Mapping, key: str = "hidden_act", default: str = "silu") -> str:
    """The contract's name of an activation."""
    return one_of(hf, key, ACTIVATIONS, default)


def head_dim(hf: Mapping, default: int | None = None) -> int:
    """The size of a head: as the config says, else `default`, else the heads share the width."""
    if hf.get("head_dim") is not None or default is not None:
        return whole(hf, "head_dim", default, most=MOST_HEAD_DIM)
    width, heads = whole(hf, "hidden_size"), whole(hf, "num_attention_heads")
    if width % heads or width // heads > MOST_HEAD_DIM:
        raise contradiction(f"The config has hidden_size = {width}, which {heads} attention heads cannot share.")
    return width // heads


def groups(hf: Mapping) -> tuple[int, int]:
    """Query heads and key heads."""
    heads = whole(hf, "num_attention_heads")
    kv_heads = whole(hf, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise contradiction(f"The config has {heads} attention heads, which {kv_heads} key/value heads cannot serve.")
    return heads, kv_heads


def layer_count(hf: Mapping) -> int:
    return whole(hf, "num_hidden_layers", most=MOST_LAYERS)


def each_layer(hf: Mapping, key: str, kind: type[T], usual: Callable[[int], T]) -> list[T]:
    """A value for each layer: the list under `key`, else what `usual` says of a layer's index. Raises BadFile for a
    list of another length."""
    count, given = layer_count(hf), several(hf, key, kind)
    if given and len(given) != count:
        raise contradiction(f"The config has num_hidden_layers = {count} and {len(given)} {key}.")
    return [*given] or [usual(i) for i in range(count)]


def sliding_layers(hf: Mapping, usual: Callable[[int], bool]) -> list[bool]:
    """Which layers have the sliding window: as layer_types says, else as `usual` says of a layer's index."""
    known = {"full_attention": False, "sliding_attention": True}
    words = {slides: word for word, slides in known.items()}
    kinds = each_layer(hf, "layer_types", str, lambda layer: words[usual(layer)])
    return [one_of({"layer_types": kind}, "layer_types", known, "") for kind in kinds]
