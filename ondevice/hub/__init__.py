"""A name into a local file or folder: a path, a catalog name, or a Hugging Face repo id, fetched when it is not here.

Only what a model needs is fetched, never code or pickles. Downloads resume, are checked, and appear whole or not at
all. Nothing is printed: `say` hears what is going on, `progress` how far it is.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadOption
from ..registry import did_you_mean

if TYPE_CHECKING:
    from ..catalog import CATALOG
    from .files import Fetching, Progress, Say
    from .local import LocalModel, home, local_models

__all__ = ["CATALOG", "Fetching", "LocalModel", "Progress", "Say", "home", "local_models", "resolve"]
WHERE = {"CATALOG": "..catalog", "Fetching": ".files", "Progress": ".files", "Say": ".files"}  # others: in .local
REPO = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<file>[^@]+\.gguf))?(?:@(?P<revision>[\w./-]+))?")


def __getattr__(name: str) -> Any:
    """What only fetching needs (sockets, hashes, archives) is loaded by those who fetch."""
    if name not in __all__:
        raise AttributeError(name)
    return getattr(import_module(WHERE.get(name, ".local"), __name__), name)


def resolve(
    name: str,
    say: Say = lambda text: None,
    progress: Progress = lambda event: None,
    refresh: bool = False,
    config_alone: bool = False,
) -> Path:
    """The local folder or .gguf file that `name` means, fetched if need be.

    name: a path; a catalog name; owner/name or owner/name:file.gguf, either with @revision. refresh: ask the Hub for a
    newer one, although one is here (otherwise nothing leaves this machine then). config_alone: of a repo that is not
    here only the config.json is fetched, and its path given. Raises BadOption for a name that means nothing,
    Unavailable when it cannot be fetched now, BadFile when what came is not what it should be.
    """
    path = Path(name).expanduser()
    if name and path.exists():  # a path of nothing is the folder where we are, which nobody meant
        return path
    from ..catalog import CATALOG
    from .entries import catalog_model
    from .repos import repo_config, repo_model

    if name in CATALOG:
        return catalog_model(CATALOG[name], say, progress)
    found = REPO.fullmatch(name)
    if found and not name.startswith(".") and (found["file"] or path.suffix != ".gguf"):
        if config_alone and not found["file"]:
            return repo_config(found["repo"], found["revision"])
        return repo_model(found["repo"], found["file"], found["revision"], say, progress, refresh)
    known = did_you_mean(name, CATALOG)
    raise BadOption(
        f"There is no model {name!r}: no such file or folder, catalog name or Hub repo (owner/name).",
        f"{known} Or give the path of a folder or a .gguf file.",
    )
