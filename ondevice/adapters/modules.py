"""The model's parts as adapters name them: paths of Hugging Face's modules, to our names and back."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..models.config import ModelConfig
from ..models.families import Family
from ..models.parameters import expected


class Place(NamedTuple):
    """One of our tensors, or one expert of it."""

    name: str
    expert: int | None = None


class Modules:
    """Everything in a model that an adapter may change. shapes: by our names, experts stacked, `head` even where it is
    the embedding. paths: the module of each place, as this family's files name it first. experts: our stacks -> the
    module that holds them all in transformers; those alone whose files have each expert's parts apart. stacked: our
    stacks -> the module of each in mlx-lm, where the family's files may have them so.
    """

    def __init__(self, family: Family, config: ModelConfig):
        self.config = config
        self.shapes = dict(expected(config))
        if config.tied:
            self.shapes["head"] = self.shapes["embed"]
        self.tensors: dict[str, Place] = {}  # every name that a file may use for one of our tensors
        self.paths: dict[Place, str] = {}
        self.experts: dict[str, str] = {}
        self.stacked: dict[str, str] = {}
        for name in self.shapes:
            for spelling in family.names.spellings(name):
                for place, spelled in self._places(name, spelling):
                    self.tensors.setdefault(spelled, place)
                    self.paths.setdefault(place, spelled.removesuffix(".weight"))
                if "{e}" in spelling:
                    module = spelling.partition(".{e}.")[0].replace(".block_sparse_moe.", ".mlp.")
                    self.experts.setdefault(name, module)
                elif len(self.shapes[name]) == 3:
                    self.stacked.setdefault(name, spelling.removesuffix(".weight"))
        for name in self.experts:
            self.paths.pop(Place(name), None)

    def _places(self, name: str, spelling: str) -> Iterator[tuple[Place, str]]:
        if "{e}" not in spelling:
            yield Place(name), spelling
            return
        for e in range(self.shapes[name][0]):
            yield Place(name, e), spelling.replace("{e}", str(e))

    def at(self, path: str) -> Place | None:
        """The matrix whose module this is."""
        place = self.tensors.get(f"{path}.weight")
        return place if place and len(self.shapes[place.name]) > 1 else None

    def shape(self, place: Place) -> tuple[int, ...]:
        """Of the matrix at a place: [O, I]; [E, O, I] for experts as a whole."""
        shape = self.shapes[place.name]
        return shape if place.expert is None else shape[1:]

    def matrices(self) -> Iterator[tuple[str, Place]]:
        """Path and place of every matrix, once."""
        for place, path in self.paths.items():
            if len(self.shapes[place.name]) > 1:
                yield path, place


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
