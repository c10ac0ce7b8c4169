"""What is finished of a long work, in a hidden folder beside its destination: after a kill it goes on from there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ..checkpoint.write import write_file
from ..errors import OnDeviceError
from ..models.parameters import Parameters
from ..tensors import Affine, Tensor


def identity(*places: Path | None) -> list:
    """Tells a model's weights or a text from what was there by that name before."""
    found: list = []
    for place in places:
        files = sorted(place.glob("*.safetensors")) if place and place.is_dir() else [place]
        found.append([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f and f.exists()])
    return found


class Work:
    """Named arrays and records on disk. What another work has left there (other weights or settings) is thrown away.

    fingerprint: of all that the results depend on. kind: of work, in the folder's name. `resumed`: something of this
    same work was there.
    """

    def __init__(self, dest: Path, fingerprint: Mapping[str, Any], kind: str = "quantize"):
        self.path = dest.parent / f".{dest.name}.{kind}"
        self._fingerprint = json.dumps(fingerprint, sort_keys=True, default=str)
        self.resumed = self._read("fingerprint") == self._fingerprint
        if not self.resumed:
            self.remove()

    def _ready(self) -> None:
        """The folder is made when there is something to keep."""
        if not self.path.is_dir():
            try:
                self.path.mkdir()
            except OSError as error:
                raise self._failed(error) from error
            write_file(self.path / "fingerprint.json", json.dumps(self._fingerprint).encode())

    def _failed(self, error: OSError) -> OnDeviceError:
        return OnDeviceError(
            f"{self.path} could not be written: {error.strerror or error}.",
            "Free some space, or check rights; then repeat the command: it goes on from what is finished.",
        )

    def record(self, name: str) -> Any:
        """What `keep_record` kept; None where there is nothing."""
        return self._read(name)

    def keep_record(self, name: str, value: Any) -> None:
        self._ready()
        write_file(self.path / f"{name}.json", json.dumps(value).encode())

    def arrays(self, name: str) -> dict[str, np.ndarray] | None:
        """What `keep` kept; None where there is nothing, or what a power cut has spoilt."""
        try:
            with np.load(self.path / f"{name}.npz", allow_pickle=False) as stored:
                return dict(stored)
        except (OSError, ValueError, EOFError, BadZipFile):
            return None

    def keep(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Whole or not at all."""
        temporary = self.path / f"{name}.partial.npz"
        try:
            self._ready()
            np.savez(temporary, **arrays)
            temporary.replace(self.path / f"{name}.npz")
        except OSError as error:
            raise self._failed(error) from error

    def keep_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.keep(name, {f"{key}/{part}": a for key, t in tensors.items() for part, a in t.parts.items()})

    def tensors(self, name: str, parameters: Parameters, forms: Mapping[str, Affine]) -> dict[str, Tensor] | None:
        """What `keep_tensors` kept, by our names, in these formats or as the parameters are; None where there is
        nothing."""
        stored = self.arrays(name)
        if stored is None:
            return None
        parts: dict[str, dict[str, np.ndarray]] = {}
        for key, array in stored.items():
            tensor, _, part = key.rpartition("/")
            parts.setdefault(tensor, {})[part] = array
        return {n: Tensor(parameters.shapes[n], forms.get(n) or parameters[n].format, p) for n, p in parts.items()}

    def begin(self) -> Path:
        """The folder, for what others write into it."""
        self._ready()
        return self.path

    def room(self, name: str) -> Path:
        """An empty folder in it; what was there by that name goes."""
        path = self.begin() / name
        try:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        except OSError as error:
            raise self._failed(error) from error
        return path

    def end(self, made: Path, dest: Path) -> None:
        """What was made becomes `dest`, and all else goes. Raises OnDeviceError where it cannot; then all stays."""
        try:
            made.rename(dest)
        except OSError as error:
            raise OnDeviceError(
                f"{dest} could not be made: {error.strerror or error}.",
                f"Nothing is lost: see that nothing of that name is there, free some space, and repeat ({self.path}).",
            ) from error
        self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self.path / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
