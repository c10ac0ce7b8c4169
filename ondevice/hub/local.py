"""The models that are here: the catalog's that were fetched, and those in the Hugging Face cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..catalog import CATALOG
from ..errors import OnDeviceError
from .files import nbytes


@dataclass(frozen=True)
class LocalModel:
    """A model that is here: under what name it opens, where, its bytes, and how most of its weights are stored."""

    name: str
    path: Path
    nbytes: int
    quantization: str


def home() -> Path:
    """Where catalog models are kept: $ONDEVICE_HOME, or .cache/ondevice in the user's home."""
    return Path(os.environ.get("ONDEVICE_HOME") or Path.home() / ".cache" / "ondevice")


def local_models() -> list[LocalModel]:
    """Catalog models that were fetched, and models in the Hugging Face cache."""
    found = [(name, home() / "models" / name / entry.file) for name, entry in CATALOG.items()]
    found += _cached_repos()
    return [LocalModel(name, path, nbytes(path), _quantization(path)) for name, path in found if path.exists()]


def _cached_repos() -> Iterator[tuple[str, Path]]:
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return
    for repo in sorted(repos, key=lambda r: r.repo_id):
        if repo.repo_type != "model" or not repo.revisions:
            continue
        folder = max(repo.revisions, key=lambda r: r.last_modified).snapshot_path
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            yield repo.repo_id, folder
        for file in sorted(folder.glob("*.gguf")):
            yield f"{repo.repo_id}:{file.name}", file


def _quantization(path: Path) -> str:
    """How most of the weights are stored: "Q4_1", "4-bit (groups of 64)", "bfloat16"."""
    from ..checkpoint import open_checkpoint
    from ..schemes import label

    try:
        with open_checkpoint(path) as checkpoint:
            sizes: dict[str, int] = {}
            for name in checkpoint.names:
                tensor = checkpoint.outline(name)
                kind = label(tensor.format)
                sizes[kind] = sizes.get(kind, 0) + tensor.nbytes
            return max(sizes, key=sizes.__getitem__, default="empty")
    except OnDeviceError as error:
        return f"damaged: {error.message}"
