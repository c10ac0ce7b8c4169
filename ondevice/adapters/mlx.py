"""mlx-lm's folders: adapter_config.json and adapters.safetensors (https://github.com/ml-explore/mlx-lm).

One rank and one scale hold for the whole adapter. `lora_a` is [I, r] and `lora_b` [r, O]: the other way round than
here; experts' are [E, r, I] and [E, O, r]. Keys are paths within a layer, for the last `num_layers` layers, or whole
paths. An embedding's update also reaches a head that is the embedding.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadFile, Unsupported
from ..models.fields import number, several, table, whole
from ..schemes import to_float
from ..tensors import Tensor, store
from .adapter import Adapter, LowRank
from .files import CONFIG, file_of, json_of, read_config, read_tensors, tensor, transposed, unfit
from .modules import Modules, Place, grouped

WEIGHTS = "adapters.safetensors"
PARTS = {"lora_a": "down", "lora_b": "up", "m": "magnitude"}
LAYERS = re.compile(r"(.*\blayers)\.(\d+)\.(.*)")


@dataclass(frozen=True)
class Settings:
    """What adapter_config.json says. keys None: everything in the last `layers` layers (0 or less: in all)."""

    rank: int
    scale: float
    dora: bool
    layers: int
    keys: tuple[str, ...] | None
    dropout: float
    base: str

    def names(self, path: str, count: int) -> bool:
        """Whether a module of a model of `count` layers is one of the targets."""
        found = LAYERS.fullmatch(path)
        last = found is not None and (self.layers <= 0 or int(found[2]) >= count - self.layers)
        if self.keys is None:
            return last
        return path in self.keys or (last and found[3] in self.keys)


# ------------------------------------------------------------------------------------------------ reading


def read(folder: Path, modules: Modules) -> Adapter:
    """The adapter in a folder, checked against a model: BadFile names every mismatch."""
    settings = read_settings(folder)
    raw: dict[str, dict[str, Tensor]] = defaultdict(dict)
    problems = []
    for name, found in read_tensors(folder / WEIGHTS).items():
        path, _, last = name.rpartition(".")
        place = modules.at(path)
        if place is None or place.expert is not None or last not in PARTS:
            problems.append(f"there is no {name}")
        else:
            raw[place.name][PARTS[last]] = found
    updates = {}
    for name, parts in raw.items():
        faults = _faults(name, parts, settings, modules)
        problems += faults
        if not faults:
            updates[name] = _update(name, parts, settings.scale, modules)
    problems += _untouched(raw, settings, modules)
    if problems:
        raise unfit(folder, grouped(problems))
    if not updates:
        raise BadFile(f"The adapter {folder} changes nothing.", "Get the adapter again.")
    if modules.config.tied and "embed" in updates:
        updates["head"] = _for_head(updates["embed"])
    return Adapter(updates, dropout=settings.dropout, base=settings.base)


def read_settings(folder: Path) -> Settings:
    """Raises BadFile for values that make no sense, Unsupported for a fine-tune that is no adapter."""
    config = read_config(folder)
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise Unsupported(
            f"{folder} is a fine-tune of type {kind!r:.40}; LoRA and DoRA are read here.",
            "Fuse it where it was made (mlx_lm.fuse), and give the result as a model.",
        )
    try:
        rule = table(config, "lora_parameters")
        return Settings(
            rank=whole(rule, "rank"),
            scale=number(rule, "scale"),
            dora=kind == "dora",
            layers=config["num_layers"] if type(config.get("num_layers")) is int else whole(config, "num_layers"),
            keys=tuple(several(rule, "keys", str)) or None,
            dropout=number(rule, "dropout") if rule.get("dropout") else 0.0,
            base=str(config.get("model") or ""),
        )
    except BadFile as error:
        raise BadFile(f"{folder / CONFIG}: {error.message}", "Get the adapter again, or correct this file.") from None


def _path(name: str, modules: Modules) -> str:
    """A weight's module as mlx-lm has it, experts stacked; "" where it has none of its own."""
    return modules.paths.get(Place(name)) or modules.stacked.get(name, "")


def _paths(modules: Modules) -> dict[str, str]:
    """Every module with a matrix -> our name of it."""
    return {path: name for name, s in modules.shapes.items() if len(s) > 1 and (path := _path(name, modules))}


def _faults(name: str, parts: Mapping[str, Tensor], settings: Settings, modules: Modules) -> list[str]:
    """What is wrong with one module's update."""
    path, (*experts, outputs, inputs), r = _path(name, modules), modules.shapes[name], settings.rank
    wanted = {"down": [(inputs, r)], "up": [(r, outputs)]}
    if experts:  # lora_a was flat once
        wanted = {"down": [(*experts, r, inputs), (experts[0] * r, inputs)], "up": [(*experts, outputs, r)]}
    elif name == "embed":
        wanted = {"down": [(outputs, r)], "up": [(r, inputs)]}
    if settings.dora:
        wanted["magnitude"] = [(outputs,)]
    told = {part: file for file, part in PARTS.items()}
    faults = [f"{path} lacks {told[part]}" for part in wanted if part not in parts]
    for part, found in parts.items():
        if part not in wanted:
            faults.append(f"{path} has {told[part]}, which its config does not say")
        elif found.shape not in wanted[part]:
            faults.append(f"{path}.{told[part]} is {list(found.shape)}, not {list(wanted[part][0])}")
    if settings.dora and (experts or name == "embed"):
        faults.append(f"{path} is adapted with DoRA, which neither embeddings nor experts are here")
    return faults


def _update(name: str, parts: Mapping[str, Tensor], scale: float, modules: Modules) -> LowRank:
    down, up = parts["down"], parts["up"]
    if len(modules.shapes[name]) == 3:
        experts, inputs = modules.shapes[name][0], modules.shapes[name][-1]
        down = tensor(down.parts["weight"].reshape(experts, -1, inputs), down.format.dtype)
        return LowRank(down, up, scale)
    return LowRank(down if name == "embed" else transposed(down), transposed(up), scale, parts.get("magnitude"))


def _for_head(update: LowRank) -> LowRank:
    """An embedding's update as that of a head that is the same."""
    return LowRank(transposed(update.up), update.down, update.scale)


def _untouched(held: Mapping[str, Any], settings: Settings, modules: Modules) -> list[str]:
    """Targets that the config names and the file does not hold, and those that no module of the model answers to."""
    count = len(modules.config.layers)
    paths = _paths(modules)
    problems = [
        f"{path} is a target, and the file holds no update of it"
        for path, name in paths.items()
        if settings.names(path, count) and name not in held
    ]
    within = {found[3] for path in paths if (found := LAYERS.fullmatch(path))}
    return problems + [f"the target {k} is no module of it" for k in settings.keys or () if k not in {*paths, *within}]


# ------------------------------------------------------------------------------------------------ writing


def files(adapter: Adapter, modules: Modules) -> dict[str, bytes]:
    """The files of a folder that mlx-lm reads. Raises Unsupported for what it has no place for."""
    adapter.require_weights("written in mlx-lm's format")
    updates = _placed(adapter, modules)
    rank, scale = max(u.rank for u in updates.values()), next(iter(updates.values())).scale
    tensors: dict[str, Tensor] = {}
    for name, update in updates.items():
        path, down, up = _path(name, modules), _ranked(update.down, rank, name, 0), _ranked(update.up, rank, name, 1)
        up = up if update.scale == scale else _times(up, update.scale / scale)
        if len(modules.shapes[name]) == 2:
            down, up = down if name == "embed" else transposed(down), transposed(up)
        tensors |= {f"{path}.lora_a": down, f"{path}.lora_b": up}
        if update.magnitude is not None:
            tensors[f"{path}.m"] = update.magnitude
    keys, layers = _keys([_path(name, modules) for name in updates], modules)
    config = {
        "fine_tune_type": "dora" if adapter.dora else "lora",
        "num_layers": layers,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": adapter.dropout, "keys": keys},
    } | ({"model": adapter.base} if adapter.base else {})
    return {CONFIG: json_of(config), WEIGHTS: file_of(tensors)}


def _placed(adapter: Adapter, modules: Modules) -> dict[str, LowRank]:
    """The updates, a tied head's left to the embedding's."""
    updates = dict(adapter.updates)
    refused = sorted({*adapter.replaced, *(name for name in updates if not _path(name, modules))})
    mixed = adapter.dora and any(u.magnitude is None for u in updates.values())
    if adapter.dora:
        refused += [name for name in updates if name == "embed" or len(modules.shapes[name]) == 3]
    if modules.config.tied and {"head", "embed"} & set(updates):
        head, wanted = updates.pop("head", None), _for_head(updates["embed"]) if "embed" in updates else None
        if head is None or wanted is None or not (_same(head.down, wanted.down) and _same(head.up, wanted.up)):
            refused.append("an embedding's update that does not reach the head, which shares its weight")
    if refused or mixed or not updates:
        what = ", ".join(refused) or ("DoRA on some weights only" if mixed else "an adapter without updates")
        raise Unsupported(f"mlx-lm's format has no place for {what}.", "Keep it in PEFT's format: --to peft.")
    return updates


def _same(a: Tensor, b: Tensor) -> bool:
    return np.array_equal(a.parts["weight"], b.parts["weight"])


def _ranked(found: Tensor, rank: int, name: str, side: int) -> Tensor:
    """down (side 0) or up (side 1) with zeros up to a rank: mlx-lm has one for all."""
    axis = -1 if side or name == "embed" else -2
    part = found.parts["weight"]
    if part.shape[axis] == rank:
        return found
    missing = [(0, 0)] * part.ndim
    missing[axis] = (0, rank - part.shape[axis])
    return tensor(np.pad(part, missing), found.format.dtype)


def _times(found: Tensor, factor: float) -> Tensor:
    exact = found.format.dtype == "bfloat16" and abs(math.frexp(factor)[0]) == 0.5
    dtype = "bfloat16" if exact else "float32"
    return tensor(store(to_float(found) * np.float32(factor), dtype), dtype)


def _keys(paths: Sequence[str], modules: Modules) -> tuple[list[str], int]:
    """keys and num_layers that mean exactly these modules: paths within the last layers, or else whole ones."""
    count = len(modules.config.layers)
    found = [m for path in paths if (m := LAYERS.fullmatch(path))]
    within = sorted({m[3] for m in found})
    layers = count - min((int(m[2]) for m in found), default=count)
    outside = [path for path in paths if not LAYERS.fullmatch(path)]
    every = _paths(modules)
    short = Settings(1, 1.0, False, layers, tuple(within + outside), 0.0, "")
    if found and {p for p in every if short.names(p, count)} == set(paths):
        return [*within, *outside], layers
    return sorted(paths), 0
