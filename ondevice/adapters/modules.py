"""The model's parts as adapters name them: paths of Hugging Face's modules, to our names and back."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..models.config import ModelConfig
from ..models.families import Family
from ..models.families.views import ROWS
from ..models.parameters import expected


class Place(NamedTuple):
    """One of our tensors, or one expert of it."""

    name: str
    expert: int | None = None


class Piece(NamedTuple):
    """One of our weights as a module of transformers holds it: whole, or as which of its rows (families/views.py)."""

    name: str
    views: tuple[str, ...]


class Modules:
    """Everything in a model that an adapter may change. shapes: by our names, experts stacked, `head` even where it is
    the embedding. tensors: every name that a file may use for one of our tensors, and how it lies there. paths: the
    module of each place, as this family's files name it first. held: transformers' modules, and its stacks of experts,
    which are parameters -> our weights in each. stacked: our stacks -> the module of each in mlx-lm, where the family's
    files may have them so.
    """

    def __init__(self, family: Family, config: ModelConfig):
        self.config = config
        self.shapes = dict(expected(config))
        if config.tied:
            self.shapes["head"] = self.shapes["embed"]
        self.tensors: dict[str, tuple[Place, tuple[str, ...]]] = {}
        self.paths: dict[Place, str] = {}
        self.held: dict[str, list[Piece]] = defaultdict(list)
        self.stacked: dict[str, str] = {}
        for name in self.shapes:
            for spelling, views in family.names.places(name):
                if {*ROWS, "heads"} & {*views}:
                    continue
                for place, spelled in self._places(name, spelling):
                    self.tensors.setdefault(spelled, (place, views))
                    self.paths.setdefault(place, spelled.removesuffix(".weight"))
                if "{e}" not in spelling and len(self.shapes[name]) == 3:
                    self.stacked.setdefault(name, spelling.removesuffix(".weight"))
            if home := _home(family, name):
                self.held[home[0].removesuffix(".weight")].append(Piece(name, home[1]))
        self.held = dict(self.held)
        self.homes = {piece.name: path for path, pieces in self.held.items() for piece in pieces}

    def _places(self, name: str, spelling: str) -> Iterator[tuple[Place, str]]:
        if "{e}" not in spelling:
            yield Place(name), spelling
            return
        for e in range(self.shapes[name][0]):
            yield Place(name, e), spelling.replace("{e}", str(e))

    def at(self, path: str) -> Place | None:
        """The matrix whose module this is."""
        place, views = self.tensors.get(f"{path}.weight", (None, ()))
        return place if place and len(self.shapes[place.name]) > 1 and "kernels" not in views else None

    def is_matrix(self, path: str) -> bool:
        """Whether a path of `held` is a module with a matrix."""
        name, views = self.held[path][0]
        return len(self.shapes[name]) > 1 and "kernels" not in views and not self.is_stack(path)

    def is_stack(self, path: str) -> bool:
        """Whether a path of `held` is a parameter: all experts in one."""
        name, views = self.held[path][0]
        return len(self.shapes[name]) == 3 and "heads" not in views

    def matrices(self) -> Iterator[str]:
        """Paths of transformers' modules that are matrices; experts' too, as it had them when each was a module."""
        yield from filter(self.is_matrix, self.held)
        yield from (path for place, path in self.paths.items() if place.expert is not None)


def _home(family: Family, name: str) -> tuple[str, tuple[str, ...]] | None:
    """What transformers calls the tensor that holds one of ours, in memory, and how ours lies there; None where a stack
    of experts is in no tensor that can be adapted."""
    places = [place for place in family.names.marked(name) if "mlx" not in place[1] and "{e}" not in place[0]]
    if not places:
        return None
    spelled, views = next((place for place in places if "module" in place[1]), places[0])
    stack = ".moe." in name and not spelled.endswith((".weight", ".bias"))
    if stack and "module" not in views:
        return None
    turned = () if name.endswith(".bias") else ("T", "kernels", "swapped")
    return spelled, tuple(view for view in views if view in (*ROWS, "heads", *turned))


def grouped(problems: Iterable[str]) -> list[str]:
    """Problems that differ only in the layer become one that lists the layers: all are named, and stay readable."""
    layers: dict[str, list[int]] = defaultdict(list)
    for problem in problems:
        found = re.search(r"(?<=\.)\d+(?=\.)", problem)
        key = problem if found is None else problem[: found.start()] + "*" + problem[found.end() :]
        layers[key] += [] if found is None else [int(found[0])]
    return [key if not numbers else _told(key, sorted(set(numbers))) for key, numbers in layers.items()]


def _told(key: str, numbers: list[int]) -> str:
    if len(numbers) == 1:
        return key.replace("*", str(numbers[0]), 1)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    listed = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"{key} (* = {listed})"
