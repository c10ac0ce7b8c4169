"""A model folder or file: read through memory maps, written atomically, verified.

`open_checkpoint` understands Hugging Face folders (safetensors, sharded or not; MLX-quantized ones too) and GGUF. It
reads headers only and trusts none of them; tensors are views of the files, read when touched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadFile, Unavailable
from ..schemes import label, outline
from ..tensors import Tensor
from . import gguf
from .files import read_object, release

if TYPE_CHECKING:
    from .quantized import AnyEntry
    from .write import Spec, write_folder

__all__ = ["Checkpoint", "Spec", "Summary", "open_checkpoint", "release", "verify", "write_folder"]


def __getattr__(name: str) -> Any:
    """Who only reads need not wait for what writes."""
    if name not in ("Spec", "write_folder"):
        raise AttributeError(name)
    from . import write

    return getattr(write, name)


class Checkpoint:
    """Named tensors of one model.

    path: the folder or the .gguf file. kind: "huggingface" or "gguf". config: config.json ({} for GGUF). metadata:
    GGUF's keys and values ({} for a folder). files: the folder's side files (tokenizer.json, …) by name. names: of the
    tensors, as the file has them.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        entries: Mapping[str, AnyEntry],
        config: dict[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        files: dict[str, Path] | None = None,
    ):
        self.path, self.kind = path, kind
        self.config, self.metadata, self.files = config or {}, metadata or {}, files or {}
        self._entries = dict(entries)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, as stored."""
        return sum(entry.nbytes for entry in self._entries.values())

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> Tensor:
        """The tensor called `name`, as views of its file. Raises BadFile when there is none."""
        if name not in self._entries:
            raise BadFile(f"{self.path} has no tensor named {name!r}.", "Its download or conversion may be incomplete.")
        return self._entries[name].load()

    def described(self, name: str) -> dict[str, Any]:
        """A side file that is a JSON object, such as generation_config.json; {} where there is none. Raises BadFile."""
        return read_object(self.files[name]) if name in self.files else {}

    def entry(self, name: str) -> AnyEntry:
        """Where it lies, for who reads of it later."""
        return self._entries[name]

    def outline(self, name: str) -> Tensor:
        """A tensor of that shape and format which takes no memory: nothing is read or put in another order."""
        entry = self._entries[name]
        return outline(entry.shape, entry.format)

    def release(self, *names: str) -> None:
        """Give back the memory of tensors' pages, as `release` does: of those in the file, where one was copied."""
        release(*(place.load() for name in names for place in self._entries[name].places))

    def close(self) -> None:
        """Let go of the files; they are unmapped when the last tensor taken from them is gone."""
        self._entries.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A Hugging Face folder, a .gguf file, or a folder that holds exactly one.

    Raises Unavailable when nothing is there, BadFile for what is damaged or hostile, Unsupported for formats that
    aren't read here.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise Unavailable(f"There is no file or folder {path}.", "Check the path; ondevice models lists what is here.")
    if path.suffix == ".safetensors":
        raise BadFile(f"{path} alone is not a model.", "Give its folder, which holds config.json as well.")
    return _open_gguf(path)


def _open_folder(path: Path) -> Checkpoint:
    ggufs = gguf.first_parts(sorted(path.glob("*.gguf")))
    if ggufs and not (path / "config.json").is_file():
        if len(ggufs) > 1:
            raise BadFile(f"{path} holds {len(ggufs)} .gguf files.", f"Give one of them, such as {ggufs[0]}.")
        return _open_gguf(ggufs[0])
    from . import folder

    config, entries = folder.read(path)
    return Checkpoint(path, "huggingface", entries, config=config, files=folder.side_files(path))


def _open_gguf(path: Path) -> Checkpoint:
    metadata, entries = gguf.read_model(path)
    return Checkpoint(path, "gguf", entries, metadata=metadata)


@dataclass(frozen=True)
class Summary:
    """What a checkpoint holds. formats: name -> bytes stored in that format, most first."""

    kind: str
    tensors: int
    parameters: int
    nbytes: int
    formats: dict[str, int]


def verify(path: str | Path) -> Summary:
    """Check everything that can be checked without a reference: headers, index, every tensor's place and parts, every
    value of the metadata. Raises what `open_checkpoint` raises."""
    with open_checkpoint(path) as checkpoint:
        for key in checkpoint.metadata:
            checkpoint.metadata[key]
        tensors = [checkpoint[name] for name in checkpoint.names]
        formats: Counter[str] = Counter()
        for tensor in tensors:
            formats[label(tensor.format)] += tensor.nbytes
        parameters = sum(tensor.size for tensor in tensors)
        return Summary(checkpoint.kind, len(tensors), parameters, checkpoint.nbytes, dict(formats.most_common()))
