"""The folder a run writes to: a lock, what the run is made of, its metrics, and whether it may go on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..checkpoint import Checkpoint
from ..checkpoint.write import write_file
from ..errors import BadFile, OnDeviceError
from . import state
from .events import StepDone

RECORD = "training.json"
METRICS = "metrics.jsonl"
LOCK = ".lock"
SAMPLE = 4096  # bytes of each tensor's beginning, middle and end that stand for it in the base's digest


@contextmanager
def locked(dest: Path) -> Iterator[None]:
    """Only one run at a time writes to `dest`, which is made if need be; the system takes the lock away with the
    process, however that ends. Raises OnDeviceError."""
    with _opened(dest) as file:
        try:
            _take(file)
            if os.stat(dest / LOCK).st_ino != os.fstat(file.fileno()).st_ino:
                raise OSError("the one before took the lock's file away, and another may have made it anew")
        except OSError:
            raise OnDeviceError(
                f"{dest} is in use: another run writes to it.", "Wait for it, or choose another place."
            ) from None
        try:
            yield
        finally:
            with suppress(OSError):
                (dest / LOCK).unlink()
                dest.rmdir()  # where nothing came of it


def _opened(dest: Path) -> IO:
    try:
        dest.mkdir(exist_ok=True)
        return open(dest / LOCK, "a+")
    except OSError as error:
        raise OnDeviceError(f"{dest} cannot be written to: {error.strerror}.", "Choose another place.") from None


def _take(file: Any) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        return
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def digest_of(checkpoint: Checkpoint) -> str:
    """Tells one set of weights from another without reading them all: names, shapes, and samples of every tensor."""
    found = hashlib.sha256()
    for name in sorted(checkpoint.names):
        tensor = checkpoint[name]
        found.update(f"{name} {tensor.shape} {tensor.format}\n".encode())
        for part in tensor.parts.values():
            octets = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
            for at in (0, len(octets) // 2, max(0, len(octets) - SAMPLE)):
                found.update(octets[at : at + SAMPLE].tobytes())
    return found.hexdigest()


def read_record(dest: Path) -> dict[str, Any] | None:
    path = dest / RECORD
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise BadFile(f"{path} is damaged: {error}.", "Train again, to another place.") from None


def write_record(dest: Path, record: Mapping[str, Any]) -> None:
    write_file(dest / RECORD, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())


def admit(dest: Path, resume: bool) -> dict[str, Any] | None:
    """The record of the run to go on with; None for a new one. Raises OnDeviceError where `dest` holds something that
    must not be written over."""
    record = read_record(dest)
    if resume and (record or not _occupied(dest)):
        return record
    if record and not record.get("ended") and not (dest / state.FILE).exists():
        return None  # it came to nothing that could be lost
    if record:
        ended = bool(record.get("ended"))
        hint = "Choose another name, or remove it first." if ended else "Go on with --resume, or choose another name."
        raise OnDeviceError(f"{dest} holds a run that {'is finished' if ended else 'was interrupted'}.", hint)
    if _occupied(dest):
        raise OnDeviceError(f"{dest} exists already.", "Choose another name, or remove it first.")
    return None


def _occupied(dest: Path) -> bool:
    return any(entry.name != LOCK and not entry.name.endswith(".partial") for entry in dest.iterdir())


def check_unchanged(dest: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises OnDeviceError, naming what differs between the run in `dest` and this one."""
    changed = [*_changes("", then.get("identity", {}), now["identity"])]
    if changed:
        raise OnDeviceError(
            f"{dest} cannot go on, as the run would not be the same: {'; '.join(changed[:8])}.",
            "Give what the run was started with, or start another one.",
        )


def _changes(prefix: str, then: Any, now: Any) -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted(then.keys() | now.keys()):
            yield from _changes(f"{prefix} {key}".strip(), then.get(key), now.get(key))
    elif then != now:
        long = isinstance(then, str) and len(then) == 64
        yield f"{prefix} has changed" if long else f"{prefix} was {then}, is {now}"


class Metrics:
    """metrics.jsonl: one object a step, at once. A resumed run drops what came behind its checkpoint."""

    def __init__(self, dest: Path, done: int):
        self.path = dest / METRICS
        self.kept = [m for m in read_metrics(self.path) if m["step"] <= done]
        write_file(self.path, "".join(json.dumps(m) + "\n" for m in self.kept).encode())

    def add(self, step: StepDone) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(step.as_dict()) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: the last may have been cut off by a kill."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def clear(dest: Path) -> None:
    """What only an unfinished run needs."""
    for path in (dest / state.FILE, *dest.glob(".*.partial")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def digest_of_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return found.hexdigest()
