"""Bits where they matter: one format for each tensor, so that the sum of their costs is least within a size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import BadOption
from ...models.parameters import Parameters
from ...schemes import AFFINE_BITS, to_float
from ...tensors import Affine
from .gptq import search
from .matrices import affine_bytes, numbers, scale_dtype
from .options import GROUPS
from .sensitivity import Cost

ROWS = 128  # of a matrix whose rounding is tried in every format
UNITS = 1 << 16  # that a size is divided in, at most


@dataclass(frozen=True)
class Choice:
    """One way to store a tensor: its bytes, and what it costs in nats a token."""

    form: Affine
    nbytes: int
    cost: float


def formats(parameters: Parameters, name: str) -> list[Affine]:
    """Every format that fits the tensor's rows."""
    columns, dtype = parameters.shapes[name][-1], scale_dtype(parameters[name])
    return [Affine(bits, group, dtype) for bits in AFFINE_BITS for group in GROUPS if columns % group == 0]


def choices(parameters: Parameters, name: str, cost: Cost) -> list[Choice]:
    """Every format of a tensor, tried on some of its rows."""
    shape, values = parameters.shapes[name], numbers(parameters, name)
    return [Choice(form, affine_bytes(shape, form), _tried(values, cost, form)) for form in formats(parameters, name)]


def require_reachable(parameters: Parameters, names: Iterable[str], nbytes: int, fixed: int) -> None:
    """Raises BadOption, with what is nearest, where not even the smallest format of each tensor fits in `nbytes`."""
    least = fixed
    for name in names:
        least += min(affine_bytes(parameters.shapes[name], form) for form in formats(parameters, name))
    if least > nbytes:
        raise BadOption(
            f"No plan takes {nbytes / 1e6:.2f} MB or less: 2 bits for every matrix take {least / 1e6:.2f} MB.",
            f"Give --target-size {math.ceil(least / 1e4) / 100:.2f}MB or more, or a smaller model.",
        )


def _tried(values: np.ndarray, cost: Cost, form: Affine) -> float:
    if values.ndim == 3:
        parts = (Cost(outputs, inputs) for outputs, inputs in zip(cost.outputs, cost.inputs, strict=True))
        most = max(ROWS // len(values), 2)
        return sum(_tried_matrix(matrix, part, form, most) for matrix, part in zip(values, parts, strict=True))
    return _tried_matrix(values, cost, form, ROWS)


def _tried_matrix(values: np.ndarray, cost: Cost, form: Affine, most: int) -> float:
    """What rounding in this format costs; where there are more rows than `most`, half of those tried are the dearest
    and the rest stand for all others."""
    order = np.argsort(-cost.outputs, kind="stable")
    dearest, others = order[: most // 2], order[most // 2 :]
    sample = others[:: max(1, -(-len(others) // (most - most // 2)))]
    rows = np.concatenate([dearest, sample])
    errors = to_float(search(values[rows], cost.inputs, form)) - values[rows]
    stood_for = cost.outputs[others].sum() / max(cost.outputs[sample].sum(), 1e-30) if len(sample) else 0.0
    return cost.of(errors[: len(dearest)], dearest) + stood_for * cost.of(errors[len(dearest) :], sample)


def allocate(table: Mapping[str, Sequence[Choice]], nbytes: int, fixed: int = 0) -> dict[str, Choice]:
    """One choice a tensor, of least cost in all, that together with `fixed` bytes take at most `nbytes`.

    By dynamic programming over sizes (the multiple-choice knapsack problem, Kellerer et al. 2004, chapter 11), exact
    where sizes have a common divisor that is not too small. Where nothing fits, the smallest of each.
    """
    unit = math.gcd(*(c.nbytes for several in table.values() for c in several))
    unit = max(unit, -(-(nbytes - fixed) // UNITS))
    room = (nbytes - fixed) // unit
    if sum(min(-(-c.nbytes // unit) for c in several) for several in table.values()) > room:
        return {name: min(several, key=lambda c: c.nbytes) for name, several in table.items()}
    return _knapsack(table, unit, room)


def _knapsack(table: Mapping[str, Sequence[Choice]], unit: int, room: int) -> dict[str, Choice]:
    best = np.zeros(room + 1)  # by units spent at most: the least cost of the tensors so far
    taken = []
    for several in table.values():
        fresh, chosen = np.full(room + 1, np.inf), np.zeros(room + 1, np.uint8)
        for index, choice in enumerate(several):
            size = -(-choice.nbytes // unit)
            if size > room:
                continue
            offered = best[: room + 1 - size] + choice.cost
            better = offered < fresh[size:]
            fresh[size:][better], chosen[size:][better] = offered[better], index
        best = fresh
        taken.append(chosen)
    found = {}
    for (name, several), chosen in zip(reversed(table.items()), reversed(taken), strict=True):
        found[name] = several[chosen[room]]
        room -= -(-found[name].nbytes // unit)
    return {name: found[name] for name in table}
