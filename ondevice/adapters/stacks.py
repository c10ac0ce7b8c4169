"""Experts as PEFT adapts them: transformers holds them stacked, gate and up in one, as parameters and not as modules.

PEFT wraps the experts' module once for each parameter, in the model's order: the first is the innermost. lora_A is
[E r, I], lora_B [O, r E], as its ParamWrapper lays them out. Here gate and up are two weights, each with an update.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from ..schemes import to_float
from ..tensors import Tensor, store
from .adapter import LowRank
from .files import tensor
from .modules import Modules

PARAMETERS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}  # in the model's order -> whose outputs they hold
WRAP = ".base_layer"
Parts = dict[str, Tensor]


def stem(path: str) -> tuple[str, int] | None:
    """A wrapped module's path without its wraps, and how many there were; None where it is no module of experts."""
    plain = path.replace(WRAP, "")
    wraps = (len(path) - len(plain)) // len(WRAP)
    return (plain, wraps) if re.search(r"\.layers\.\d+\..*experts$", plain) else None


def names(path: str, modules: Modules) -> dict[str, list[str]]:
    """Parameter of the experts' module at a path -> our weights in it; {} where this model has no such."""
    layer = re.search(r"\.layers\.(\d+)\.", path)
    found = {
        parameter: [f"layers.{layer[1]}.moe.{part}" for part in parts] if layer else []
        for parameter, parts in PARAMETERS.items()
    }
    return {p: ours for p, ours in found.items() if ours and all(n in modules.experts for n in ours)}


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
        here = names(path, modules)
        parameters = [p for p in here if targeted(f"{path}.{p}")]
        if len(parameters) != len(depths) or set(depths) != set(range(len(depths))):
            problems.append(f"{path} has updates of {len(depths)} parameters, and its config names {len(parameters)}")
            continue
        for depth, parameter in enumerate(reversed(parameters)):
            key = f"{path}.{parameter}"
            faults = _faults(key, depths[depth], rank_of(key), here[parameter], modules)
            problems += faults
            if not faults:
                updates |= _apart(depths[depth], scale_of(key), here[parameter], modules)
    return updates, problems


def _faults(key: str, parts: Mapping[str, Tensor], r: int, ours: list[str], modules: Modules) -> list[str]:
    shapes = [modules.shapes[name] for name in ours]
    experts, outputs, inputs = shapes[0][0], sum(shape[1] for shape in shapes), shapes[0][2]
    wanted = {"down": (experts * r, inputs), "up": (outputs, r * experts)}
    faults = [f"{key} lacks {part}" for part in wanted if part not in parts]
    for part, found in parts.items():
        if part not in wanted:
            faults.append(f"{key} has {part}, which experts cannot have")
        elif found.shape != wanted[part]:
            faults.append(f"{key}: {part} is {list(found.shape)}, not {list(wanted[part])}")
    return faults


def _apart(parts: Mapping[str, Tensor], scale: float, ours: list[str], modules: Modules) -> dict[str, LowRank]:
    experts = modules.shapes[ours[0]][0]
    down = parts["down"].parts["weight"]
    down = down.reshape(experts, -1, down.shape[-1])  # [E, r, I]
    up = parts["up"].parts["weight"]
    up = up.reshape(up.shape[0], -1, experts).transpose(2, 0, 1)  # [E, O, r]
    updates, at = {}, 0
    for name in ours:
        rows = up[:, at : at + modules.shapes[name][1]]
        at += modules.shapes[name][1]
        updates[name] = (down, rows)
    updates = _unblocked(updates)
    types = [parts[part].format.dtype for part in ("down", "up")]
    return {name: LowRank(tensor(d, types[0]), tensor(u, types[1]), scale) for name, (d, u) in updates.items()}


def _unblocked(pairs: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The inverse of `_blocks`, where the pattern is there and something is in it."""
    ups = [up for _, up in pairs.values()]
    first, second = ups[0], ups[-1]
    half, odd = divmod(first.shape[-1], 2)
    blocked = not odd and not first[..., half:].any() and not second[..., :half].any()
    if len(pairs) != 2 or not blocked or not first.any() or not second.any():
        return pairs
    halves = (slice(None, half), slice(half, None))
    return {name: (d[:, cut], u[..., cut]) for (name, (d, u)), cut in zip(pairs.items(), halves, strict=True)}


def write(updates: Mapping[str, LowRank], modules: Modules) -> Iterator[tuple[str, str, LowRank, Parts]]:
    """(module as it is wrapped, parameter's path, its update, its parts) for each parameter that is adapted."""
    paths = dict.fromkeys(modules.experts[name] for name in updates)
    for path in paths:
        here = names(path, modules)
        held = [p for p, ours in here.items() if any(name in updates for name in ours)]
        for wraps, parameter in enumerate(reversed(held)):
            update = _together([updates.get(name) for name in here[parameter]], here[parameter], modules)
            down, up = (t.parts["weight"] for t in (update.down, update.up))
            up = up.transpose(1, 2, 0).reshape(up.shape[1], -1)
            types = [t.format.dtype for t in (update.down, update.up)]
            parts = {"down": tensor(down.reshape(-1, down.shape[-1]), types[0]), "up": tensor(up, types[1])}
            yield path + WRAP * wraps, f"{path}.{parameter}", update, parts


def _together(updates: list[LowRank | None], ours: list[str], modules: Modules) -> LowRank:
    """Gate's and up's update as one of their common parameter: outputs on top of each other."""
    if len(updates) == 1:
        return updates[0]
    known = next(update for update in updates if update is not None)
    scale, types = known.scale, [t.format.dtype for t in (known.down, known.up)]
    downs = [u.down.parts["weight"] for u in updates if u is not None]
    ups = [_at_scale(u, scale, modules.shapes[name], known) for u, name in zip(updates, ours, strict=True)]
    if all(np.array_equal(down, downs[0]) for down in downs):  # as one parameter's update, come apart, still is
        down, up = downs[0], np.concatenate(ups, 1)
    else:
        down, up = _blocks(downs, ups)
    return LowRank(tensor(down, types[0]), tensor(up, types[1]), scale)


def _at_scale(update: LowRank | None, scale: float, shape: tuple[int, ...], like: LowRank) -> np.ndarray:
    """`up` [E, O, r] as `like` stores it, such that `scale` holds for it; zeros where there is no update."""
    if update is None:
        return np.zeros((shape[0], shape[1], like.rank), like.up.parts["weight"].dtype)
    if update.scale == scale:
        return update.up.parts["weight"]
    return store(to_float(update.up) * np.float32(update.scale / scale), like.up.format.dtype)


def _blocks(downs: list[np.ndarray], ups: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Two updates side by side in rank, each reaching only its own outputs."""
    ranks = [up.shape[-1] for up in ups]
    padded = [np.pad(ups[0], ((0, 0), (0, 0), (0, ranks[1]))), np.pad(ups[1], ((0, 0), (0, 0), (ranks[0], 0)))]
    return np.concatenate(downs, 1), np.concatenate(padded, 1)
