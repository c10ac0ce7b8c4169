"""Which distributions are installed, and what they announce. Every start waits for this: `importlib.metadata` takes
longer to be imported, with the parser of mails that it brings, than this takes to read all folders on the path. What
is imported from within a zip is not looked for."""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """An entry point: an object (`module:attribute`) that a distribution announces under a name."""

    name: str
    value: str

    def load(self) -> Any:
        module, _, attributes = self.value.partition("[")[0].partition(":")
        found = import_module(module.strip())
        for attribute in filter(None, attributes.strip().split(".")):
            found = getattr(found, attribute)
        return found


@cache
def distributions() -> dict[str, str]:
    """name, in small letters and with underscores -> its folder of metadata. Of several, the first on sys.path counts:
    it is the one that is imported."""
    found: dict[str, str] = {}
    for place in sys.path:
        try:
            inside = sorted(os.listdir(place or "."))
        except OSError:  # nothing is there, or it is no folder
            continue
        for folder in inside:
            if folder.endswith((".dist-info", ".egg-info")):
                found.setdefault(_plain(folder[:-10].partition("-")[0]), os.path.join(place, folder))
    return found


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(".", "_")


def folder_of(distribution: str) -> str | None:
    """Its folder of metadata, which lies beside its modules; None where it is not installed."""
    return distributions().get(_plain(distribution))


def version(distribution: str) -> str | None:
    """The installed version, None where there is none."""
    folder = folder_of(distribution)
    lines = (_text(folder, "METADATA") or _text(folder, "PKG-INFO")).splitlines() if folder else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("Version:")), None)


def entry_points(group: str) -> dict[str, Entry]:
    """What the distributions announce in a group, by name."""
    return _announced().get(group, {})


@cache
def _announced() -> dict[str, dict[str, Entry]]:
    groups: dict[str, dict[str, Entry]] = {}
    for folder in distributions().values():
        group = ""
        for line in map(str.strip, _text(folder, "entry_points.txt").splitlines()):
            name, equals, value = line.partition("=")
            if line.startswith("["):
                group = line.strip("[] ")
            elif equals and not line.startswith(("#", ";")):
                groups.setdefault(group, {})[name.strip()] = Entry(name.strip(), value.strip())
    return groups


def _text(folder: str, name: str) -> str:
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""
