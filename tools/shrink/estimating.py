"""What a plan will lose, before it is carried out: what its cuts lose, each measured alone, and what its bits will."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ...models.parameters import Parameters, expected
from ...tensors import Affine
from ..prune.cutting import Cut
from ..quantize.allocation import Choice, allocate, formats
from ..quantize.matrices import affine_bytes
from ..quantize.weighing import Weighed


@dataclass(frozen=True)
class Shared:
    """Bits shared out over what a cut leaves. cost: what the errors should come to, nats a token."""

    plan: Mapping[str, Affine]
    nbytes: int
    cost: float


def share_out(weighed: Weighed, parameters: Parameters, cut: Cut, target_bytes: int) -> Shared:
    """Formats for the matrices of the cut model, from what was found of the whole; nbytes is more than the target where
    even the fewest bits are too many."""
    table, fixed = {}, 0
    for name, shape in expected(cut.made).items():
        source = cut.original(name)
        if source in weighed.table:
            table[name] = _choices(weighed, cut, source, shape)
        if not table.get(name):
            table.pop(name, None)
            tensor = parameters[source]
            fixed += tensor.nbytes * int(np.prod(shape)) // tensor.size
    chosen = allocate(table, target_bytes, fixed)
    nbytes = fixed + sum(choice.nbytes for choice in chosen.values())
    cost = float(sum(choice.cost for choice in chosen.values()))
    return Shared({name: choice.form for name, choice in chosen.items()}, nbytes, cost)


def share_out_alike(parameters: Parameters, names: Iterable[str], target_bytes: int) -> Shared:
    """Formats for these matrices where nothing is known of what an error costs: as if it were the same in each number,
    a quarter with every bit more. cost: no nats."""
    table = {
        name: [
            Choice(form, affine_bytes(parameters.shapes[name], form), parameters[name].size / 4.0**form.bits)
            for form in formats(parameters, name)
        ]
        for name in names
    }
    fixed = sum(parameters[name].nbytes for name in parameters if name not in table)
    chosen = allocate(table, target_bytes, fixed)
    nbytes = fixed + sum(choice.nbytes for choice in chosen.values())
    return Shared({name: choice.form for name, choice in chosen.items()}, nbytes, 0.0)


def _choices(weighed: Weighed, cut: Cut, source: str, shape: tuple[int, ...]) -> list[Choice]:
    """Of a matrix of the cut model: those of the whole one, less what went with rows and columns."""
    cost, stays = weighed.costs[source], 1.0
    for axis, kept in cut.picks(source):
        weights = cost.outputs if axis == 0 else cost.inputs
        stays *= float(weights[kept].sum() / max(weights.sum(), 1e-30))
    return [
        Choice(c.form, affine_bytes(shape, c.form), c.cost * stays)
        for c in weighed.table[source]
        if shape[-1] % c.form.group_size == 0
    ]
