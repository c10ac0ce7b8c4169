"""Adapters onto a model that is open: host tensors -> what the decoder's scope applies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from ..backends.base import Backend, W
from ..errors import BadOption
from ..models.attention import WHOLE
from ..models.decoder import SoftPrompt
from ..models.scope import Gains, Lora
from ..schemes import take_rows, to_float
from ..tensors import Tensor, dense, store
from .adapter import Adapter, LowRank
from .merging import merged

Weighted = tuple[Adapter, float]  # an adapter and how much of it


def loras(
    ops: Backend, weights: Mapping[str, W], base: Callable[[str], Tensor], adapters: Sequence[Weighted]
) -> dict[str, list[Lora]]:
    """What a decoder's `loras` becomes: the sum of the adapters' changes, each times its weight.

    weights: the model's, prepared; base: its tensors on the host. Updates of one weight that have no magnitude become
    one, ranks side by side, so that several adapters cost little more than one.
    """
    found: dict[str, list[Lora]] = {}
    for name, updates in _updates(adapters).items():
        if name.endswith(WHOLE):
            continue
        plain = [(update, weight) for update, weight in updates if update.magnitude is None]
        found[name] = [_merged(ops, plain, name == "embed")] if plain else []
        for update, weight in updates:
            if update.magnitude is not None:
                found[name].append(_dora(ops, weights, base, name, update, weight))
    return found


def soft_prompt(ops: Backend, adapters: Sequence[Weighted]) -> SoftPrompt | None:
    """The one among the adapters. Raises BadOption for several, and for a weight, which has no meaning there."""
    found = [(adapter.prompt, weight) for adapter, weight in adapters if adapter.prompt is not None]
    if not found:
        return None
    if len(found) > 1:
        raise BadOption("Two soft prompts cannot stand in front of one text.", "Give one of them.")
    (prompt, weight), *_ = found
    if weight != 1:
        raise BadOption(f"A soft prompt cannot count {weight:g} times.", "Leave out the weight.")
    return SoftPrompt(ops.prepare(_contiguous(prompt)), prompt.shape[0])


def _merged(ops: Backend, updates: Sequence[tuple[LowRank, float]], embedding: bool) -> Lora:
    """Scales go into `up`."""
    downs = [update.down for update, _ in updates]
    ups = [_scaled(update.up, update.scale * weight) for update, weight in updates]
    down = downs[0] if len(downs) == 1 else _joined(downs, -1 if embedding else -2)
    up = ups[0] if len(ups) == 1 else _joined(ups, -1)
    return Lora(ops.prepare(_contiguous(down)), ops.prepare(_contiguous(up)), 1.0)


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    """bfloat16 stays so where nothing is lost: half of the bytes to read for each token."""
    values = to_float(tensor) * np.float32(factor)
    if tensor.format.dtype == "bfloat16" and abs(math.frexp(factor)[0]) == 0.5:
        return Tensor(tensor.shape, tensor.format, {"weight": store(values, "bfloat16")})
    return dense(values)


def _joined(tensors: Sequence[Tensor], axis: int) -> Tensor:
    return dense(np.concatenate([to_float(t) for t in tensors], axis))


def _contiguous(tensor: Tensor) -> Tensor:
    part = np.ascontiguousarray(tensor.parts["weight"])
    return Tensor(tensor.shape, tensor.format, {"weight": part})


def _dora(
    ops: Backend, weights: Mapping[str, W], base: Callable[[str], Tensor], name: str, update: LowRank, weight: float
) -> Lora:
    down, up = (ops.prepare(_contiguous(t)) for t in (update.down, update.up))
    owner = "embed" if name == "head" and name not in weights else name
    if name == "embed":
        inverse = _inverse_columns(base(name), update)
    else:
        arrays = (ops.array(to_float(t), "float32") for t in (update.down, update.up))
        inverse = ops.numpy(ops.inverse_norm(weights[owner], *arrays, update.scale))
    gain = to_float(update.magnitude) * inverse
    rest, shift = weight * (gain - 1), None
    if f"{name}.bias" in weights:
        shift = ops.array(-to_float(base(f"{name}.bias")) * rest)
    return Lora(down, up, update.scale, gains=Gains(ops.array(weight * gain), ops.array(rest), shift))


def _inverse_columns(base: Tensor, update: LowRank) -> np.ndarray:
    """1 / norm of each column of an adapted embedding [V, D] -> [D], as PEFT has it."""
    up, squares = to_float(update.up), np.zeros(base.shape[1], np.float64)
    for rows, values in _row_chunks(base):
        adapted = values + np.float32(update.scale) * (to_float(update.down)[rows] @ up.T)
        squares += np.square(adapted, dtype=np.float64).sum(0)
    return (1 / np.sqrt(squares)).astype(np.float32)


def _row_chunks(tensor: Tensor, numbers: int = 1 << 22) -> Iterator[tuple[slice, np.ndarray]]:
    step = max(1, numbers // max(tensor.shape[-1], 1))
    for at in range(0, tensor.shape[0], step):
        rows = slice(at, min(at + step, tensor.shape[0]))
        yield rows, to_float(take_rows(tensor, np.arange(rows.start, rows.stop)))


def _updates(adapters: Sequence[Weighted]) -> dict[str, list[tuple[LowRank, float]]]:
    """By the weight that they change."""
    found: dict[str, list[tuple[LowRank, float]]] = {}
    for adapter, weight in adapters:
        for name, update in adapter.updates.items():
            found.setdefault(name, []).append((update, weight))
    return found


def replaced(base: Callable[[str], Tensor], adapters: Sequence[Weighted]) -> dict[str, Tensor]:
    """Whole tensors that the adapters bring: the model's own plus each one's difference times its weight; and weights
    that must have their updates in them. `base` must know what "head" is where it is the embedding."""
    found: dict[str, Tensor] = {}
    for name, updates in _updates(adapters).items():
        if name.endswith(WHOLE):
            found[name] = dense(merged(base(name), updates))
    for name in dict.fromkeys(name for adapter, _ in adapters for name in adapter.replaced):
        given = [(a.replaced[name], weight) for a, weight in adapters if name in a.replaced]
        if len(given) == 1 and given[0][1] == 1:
            found[name] = given[0][0]
            continue
        own = to_float(base(name))
        found[name] = dense(own + sum(np.float32(w) * (to_float(t) - own) for t, w in given))
    return found
