"""Experts as PEFT adapts them: transformers holds them stacked, gate and up in one, as parameters and not as modules.

PEFT wraps the experts' module once for each parameter, in the model's order: the first is the innermost. lora_A is
[E r, I], lora_B [O, r E], as its ParamWrapper lays them out. Where it takes a parameter's inputs for outputs (a stack
[E, I, O] whose module does not say `is_transposed`), the two have each other's place: [E r, O] and [I, r E].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from ..tensors import Tensor
from .adapter import LowRank
from .files import tensor
from .modules import Modules
from .pieces import Parts, apart, together

WRAP = ".base_layer"


def stem(path: str) -> tuple[str, int] | None:
    """A wrapped module's path without its wraps, and how many there were; None where it is no module of experts."""
    plain = path.replace(WRAP, "")
    wraps = (len(path) - len(plain)) // len(WRAP)
    return (plain, wraps) if re.search(r"\.layers\.\d+\..*experts$", plain) else None


def parameters(modules: Modules) -> Iterator[str]:
    """Paths of experts' stacks."""
    return (path for path in modules.held if modules.is_stack(path))


def read(
    wrapped: Mapping[str, Mapping[int, Parts]],
    targeted: Callable[[str], bool],
    rank_of: Callable[[str], int],
    scale_of: Callable[[str], float],
    modules: Modules,
) -> tuple[dict[str, LowRank], list[str]]:
    """Updates under our names from the parts of each module, by depth of wrapping; and what does not fit."""
    updates: dict[str, LowRank] = {}
    problems = []
    for path, depths in wrapped.items():
        here = [key for key in parameters(modules) if key.rpartition(".")[0] == path and targeted(key)]
        if len(here) != len(depths) or set(depths) != set(range(len(depths))):
            problems.append(f"{path} has updates of {len(depths)} parameters, and its config names {len(here)}")
            continue
        for depth, key in enumerate(reversed(here)):
            faults = _faults(key, depths[depth], rank_of(key), modules)
            problems += faults
            if not faults:
                updates |= apart(_by_expert(key, depths[depth], modules), scale_of(key), modules.held[key], modules)
    return updates, problems


def _sizes(key: str, modules: Modules) -> tuple[int, int, int]:
    """Experts, outputs, inputs of a stack."""
    shapes = [modules.shapes[piece.name] for piece in modules.held[key]]
    return shapes[0][0], sum(shape[1] for shape in shapes), shapes[0][2]


def _swapped(key: str, modules: Modules) -> bool:
    return "swapped" in modules.held[key][0].views


def _faults(key: str, parts: Mapping[str, Tensor], r: int, modules: Modules) -> list[str]:
    experts, outputs, inputs = _sizes(key, modules)
    outputs, inputs = (inputs, outputs) if _swapped(key, modules) else (outputs, inputs)
    wanted = {"down": (experts * r, inputs), "up": (outputs, r * experts)}
    faults = [f"{key} lacks {part}" for part in wanted if part not in parts]
    for part, found in parts.items():
        if part not in wanted:
            faults.append(f"{key} has {part}, which experts cannot have")
        elif found.shape != wanted[part]:
            faults.append(f"{key}: {part} is {list(found.shape)}, not {list(wanted[part])}")
    return faults


def _by_expert(key: str, parts: Mapping[str, Tensor], modules: Modules) -> Parts:
    """[E, r, I] and [E, O, r]"""
    experts = _sizes(key, modules)[0]
    down, up = (parts[part].parts["weight"] for part in ("down", "up"))
    down = down.reshape(experts, -1, down.shape[-1])
    up = up.reshape(len(up), -1, experts).transpose(2, 0, 1)
    if _swapped(key, modules):
        down, up = up.swapaxes(1, 2), down.swapaxes(1, 2)
    return {"down": tensor(down, parts["down"].format.dtype), "up": tensor(up, parts["up"].format.dtype)}


def write(updates: Mapping[str, LowRank], modules: Modules) -> Iterator[tuple[str, str, LowRank, Parts]]:
    """(module as it is wrapped, parameter's path, its update, its parts) for each parameter that is adapted."""
    by_module: dict[str, list[str]] = {}
    for key in parameters(modules):
        if any(piece.name in updates for piece in modules.held[key]):
            by_module.setdefault(key.rpartition(".")[0], []).append(key)
    for path, keys in by_module.items():
        for wraps, key in enumerate(reversed(keys)):
            update = together([updates.get(piece.name) for piece in modules.held[key]], modules.held[key], modules)
            down, up = (t.parts["weight"] for t in (update.down, update.up))
            if _swapped(key, modules):
                down, up = up.swapaxes(1, 2), down.swapaxes(1, 2)
            up = up.transpose(1, 2, 0).reshape(up.shape[1], -1)
            types = [t.format.dtype for t in (update.down, update.up)]
            parts = {"down": tensor(down.reshape(-1, down.shape[-1]), types[0]), "up": tensor(up, types[1])}
            yield path + WRAP * wraps, key, update, parts
