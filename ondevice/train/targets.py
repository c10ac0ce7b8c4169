"""Which weights a LoRA adapts, with which rank and alpha: names of Hugging Face's modules, or all linear maps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..errors import BadOption
from ..models.config import ModelConfig
from ..models.families import Family
from ..models.parameters import Shapes, expected
from ..registry import did_you_mean
from .settings import Settings

ALL = "all-linear"


@dataclass(frozen=True)
class Target:
    """One weight to adapt. name: ours; module: Hugging Face's (`{e}` in it: one an expert); shape: the weight's."""

    name: str
    module: str
    shape: tuple[int, ...]
    rank: int
    alpha: float


def find_targets(family: Family, config: ModelConfig, settings: Settings) -> list[Target]:
    """In the model's order. Later entries of `settings.targets` win over earlier ones. Raises BadOption for an entry
    that matches nothing, naming what there is."""
    candidates = {name: _module(family, name) for name in adaptable(config)}
    shapes = expected(config)
    chosen: dict[str, tuple[int, float]] = {}
    for entry in settings.targets:
        pattern, rank, alpha = _parsed(entry, settings)
        names = [name for name in candidates if _matches(pattern, name, candidates[name])]
        if not names:
            raise BadOption(f"The target {pattern!r} matches nothing in this model.", _candidates(pattern, candidates))
        chosen |= dict.fromkeys(names, (rank, alpha))
    kept = [name for name in candidates if name in chosen and _in_layers(name, config, settings.layers)]
    if not kept:
        raise BadOption(f"--layers {settings.layers} leaves nothing to adapt.", "Give more layers.")
    return [Target(n, candidates[n], shapes[n], *chosen[n]) for n in kept]


def find_whole(family: Family, config: ModelConfig, settings: Settings) -> list[str]:
    """Our names of what `settings.modules_to_save` asks for. Raises BadOption for an entry that matches nothing."""
    candidates = {name: _module(family, name) for name in expected(config)}
    chosen: dict[str, None] = {}
    for pattern in settings.modules_to_save:
        names = [name for name in candidates if _matches(pattern, name, candidates[name])]
        if not names:
            raise BadOption(f"The module {pattern!r} is not in this model.", _candidates(pattern, candidates))
        chosen |= dict.fromkeys(names)
    return list(chosen)


def adaptable(config: ModelConfig) -> Shapes:
    """Name -> shape of the weights that a LoRA can adapt: matrices, one by one or stacked by expert; a convolution's
    taps and a table of positions are none."""
    shapes = {name: shape for name, shape in expected(config).items() if len(shape) > 1}
    shapes = {name: shape for name, shape in shapes.items() if not name.endswith(("taps", "positions", ".bias"))}
    return shapes | ({"head": shapes["embed"]} if config.tied else {})


def _module(family: Family, name: str) -> str:
    return family.names.spell(name).removesuffix(".weight")


def _parsed(entry: str, settings: Settings) -> tuple[str, int, float]:
    """NAME[:RANK[:ALPHA]]; alpha keeps its proportion to the rank where it is not given."""
    name, *numbers = entry.split(":")
    try:
        rank = int(numbers[0]) if numbers else settings.rank
        usual = settings.alpha if settings.alpha is not None and not numbers else 2.0 * rank
        alpha = float(numbers[1]) if len(numbers) > 1 else usual
    except ValueError:
        raise BadOption(f"The target {entry!r} is not NAME:RANK:ALPHA.", "For example q_proj:16:32.") from None
    if not name or len(numbers) > 2 or rank < 1 or not alpha > 0:
        raise BadOption(f"The target {entry!r} makes no sense.", "Give NAME:RANK:ALPHA, for example q_proj:16:32.")
    return name, rank, alpha


def _matches(pattern: str, name: str, module: str) -> bool:
    if pattern == ALL:
        return name.startswith("layers.") and not name.endswith(".router")
    return any(fnmatchcase(full, p) for full in (module, name) for p in (pattern, f"*.{pattern}"))


def _candidates(pattern: str, candidates: dict[str, str]) -> str:
    lasts = [ALL, *dict.fromkeys(module.rpartition(".")[2] for module in candidates.values())]
    return did_you_mean(pattern, lasts)


def _in_layers(name: str, config: ModelConfig, layers: int | None) -> bool:
    found = re.match(r"layers\.(\d+)\.", name)
    if layers is None or not found:
        return True
    return int(found[1]) >= len(config.layers) - layers if layers > 0 else int(found[1]) < -layers


def describe(targets: Sequence[Target]) -> Iterator[str]:
    """For people: q_proj, k_proj, … by the last part of their names, with ranks."""
    kinds: dict[str, set[int]] = {}
    for t in targets:
        kinds.setdefault(t.module.rpartition(".")[2], set()).add(t.rank)
    for kind, ranks in kinds.items():
        yield f"{kind} (rank {'/'.join(map(str, sorted(ranks)))})"
