"""Models of the Hugging Face Hub, through its client's cache: resumed, checked by hash, used without a network."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from ..errors import BadFile, BadOption, Unavailable
from .files import BLOCK, RETRY, Fetching, Progress, Say, check, keep, nbytes, require_space

NEEDED = [  # of a repo of safetensors
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "LICENSE*",
]  # fmt: skip
DOUBLES = ["*/*", "consolidated*"]  # the same weights in other forms
TRIES = 5  # connections that bring nothing before a download is given up
PAUSE = 1.0  # seconds between two connections


def repo_model(repo: str, file: str | None, revision: str | None, say: Say, progress: Progress, refresh: bool) -> Path:
    """One GGUF of a repo, or the folder of its safetensors, in the Hub client's cache. What is there already is taken
    as it is, unless `refresh` asks for what the Hub has now."""
    from huggingface_hub import hf_hub_download, snapshot_download

    with hub_errors(repo):
        here = _cached(repo, file, revision)
        if here and not (refresh and reachable()):
            return here
        if not reachable():
            raise Unavailable(f"The Hub cannot be reached, and {repo} is not (wholly) here.", RETRY)
        _fetch_large(repo, file, revision, say, progress)
        if file:
            return Path(hf_hub_download(repo, file, revision=revision))
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=NEEDED, ignore_patterns=DOUBLES))
    _check_small(folder)
    if not _whole(folder):
        raise BadFile(
            f"The Hub repo {repo} has no config.json or not all the safetensors that it needs.",
            f"If it holds GGUF files, name one: {repo}:FILE.gguf. Pickled weights (.bin) are never opened.",
        )
    return folder


def repo_config(repo: str, revision: str | None) -> Path:
    """The folder of a repo that is here; of any other its config.json alone."""
    from huggingface_hub import errors, hf_hub_download

    with hub_errors(repo):
        if here := _cached(repo, None, revision):
            return here
        try:
            return Path(hf_hub_download(repo, "config.json", revision=revision, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            if not reachable():
                raise Unavailable(f"The Hub cannot be reached, and {repo} is not here.", RETRY) from None
        return Path(hf_hub_download(repo, "config.json", revision=revision))


def _cached(repo: str, file: str | None, revision: str | None) -> Path | None:
    """What the client's cache has of it, if that is all of it."""
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    try:
        if file:
            return Path(hf_hub_download(repo, file, revision=revision, local_files_only=True))
        needed = {"allow_patterns": NEEDED, "ignore_patterns": DOUBLES}
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, **needed))
    except errors.LocalEntryNotFoundError:
        return None
    return folder if _whole(folder) else None


def _whole(folder: Path) -> bool:
    """Whether a config and every file of weights are there."""
    shards = {"*.safetensors"}
    for index in folder.glob("*.safetensors.index.json"):
        with suppress(ValueError, AttributeError):  # a strange index is the reader's to complain of
            shards = set(map(str, json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()))
    return (folder / "config.json").is_file() and all(any(folder.glob(shard)) for shard in shards)


def _fetch_large(repo: str, file: str | None, revision: str | None, say: Say, progress: Progress) -> None:
    """Puts the large files that are needed and not here into the client's cache, under the names by which it will know
    them: the client itself neither resumes what an earlier run began nor checks more than sizes."""
    from huggingface_hub import HfApi, constants, hf_hub_url
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import WeakFileLock, filter_repo_objects

    info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    needed = {"allow_patterns": [file] if file else NEEDED, "ignore_patterns": None if file else DOUBLES}
    large = [f for f in filter_repo_objects(info.siblings, **needed, key=lambda f: f.rfilename) if f.lfs]
    if strange := next((f for f in large if not re.fullmatch("[0-9a-f]{64}", f.lfs.sha256)), None):
        raise BadFile(f"The Hub gives no SHA-256 for {strange.rfilename} of {repo}.", "Take another copy of it.")
    folder = repo_folder_name(repo_id=repo, repo_type="model")
    blobs, locks = Path(constants.HF_HUB_CACHE, folder, "blobs"), Path(constants.HF_HUB_CACHE, ".locks", folder)
    blobs.mkdir(parents=True, exist_ok=True)
    locks.mkdir(parents=True, exist_ok=True)
    missing = [f for f in large if not (blobs / f.lfs.sha256).exists()]
    before, total = 0, sum(f.lfs.size for f in missing)
    require_space(repo, blobs, total - sum(nbytes(blobs / f"{f.lfs.sha256}.incomplete") for f in missing))
    if missing:
        say(f"Fetching {repo} ({total / 1e6:.0f} MB) from the Hugging Face Hub …")
    for f in missing:
        partial, blob = blobs / f"{f.lfs.sha256}.incomplete", blobs / f.lfs.sha256
        with WeakFileLock(locks / f"{f.lfs.sha256}.lock"):  # the client's own lock for this file
            if not blob.exists():
                url = hf_hub_url(repo, f.rfilename, revision=info.sha)
                download(url, partial, f.lfs.size, lambda done, n=before: progress(Fetching(n + done, total)))
                _keep(partial, blob, f.rfilename)
        before += f.lfs.size


def _keep(partial: Path, blob: Path, name: str) -> None:
    """A file that came whole gets the name that is its SHA-256; if it is not, it goes."""
    try:
        check(partial, name, hashlib.sha256(), blob.name)
    except BadFile:
        partial.unlink()
        raise
    keep(partial, blob)


def _check_small(folder: Path) -> None:
    """The client's cache names small files by the hash that Git gives them (where it can make links)."""
    for file in [path for path in folder.iterdir() if path.is_file()]:
        blob = file.resolve()
        if re.fullmatch("[0-9a-f]{40}", blob.name):
            git = hashlib.sha1(b"blob %d\0" % blob.stat().st_size, usedforsecurity=False)
            try:
                check(blob, file.name, git, blob.name)
            except BadFile:
                file.unlink()
                blob.unlink(missing_ok=True)
                raise


def download(url: str, partial: Path, size: int, report: Callable[[int], None]) -> None:
    """Appends to `partial` what it lacks of `size` bytes, over as many connections as that takes. Raises the client's
    errors, and Unavailable when connections bring nothing any more."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    have = most = nbytes(partial)
    stalls = 0
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
        have = nbytes(partial)
        stalls = 0 if have > most else stalls + 1
        most = max(have, most)
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
def hub_errors(repo: str) -> Iterator[None]:
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
        if isinstance(error, errors.LocalEntryNotFoundError):  # the client's word for a Hub that stopped answering
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


def reachable() -> bool:
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
