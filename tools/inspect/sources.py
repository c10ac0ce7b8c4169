"""A model to look at: with its weights, or its config alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import hub
from ...checkpoint import Checkpoint, open_checkpoint
from ...checkpoint.files import read_object
from ...errors import BadFile
from ...models.config import ModelConfig
from ...models.families import Family, family_for, family_of, text_part
from ...runtime.side_files import tokenizer_of
from ...runtime.tokenizer import Tokenizer, load_tokenizer

STORED = ("dtype", "torch_dtype", "quantization")  # how a config says that all of a model is kept
MAX_CARD = 1 << 20  # of a README that is looked through for the licence


@dataclass(frozen=True)
class Source:
    """path: the folder, the .gguf, or the config.json that is all there is. checkpoint: None where it is. hf:
    config.json, translated where the file is a GGUF."""

    model: str
    path: Path
    family: Family
    hf: Mapping[str, Any]
    config: ModelConfig
    checkpoint: Checkpoint | None

    def tokenizer(self) -> Tokenizer:
        """Raises BadFile where none is here."""
        return load_tokenizer(self._folder) if self.checkpoint is None else tokenizer_of(self.checkpoint)

    def licence(self) -> str | None:
        """What the model's files say of it: GGUF's metadata, the model card, the first line of a LICENSE."""
        if self.model in hub.CATALOG:
            return hub.CATALOG[self.model].licence
        if self.checkpoint is not None and self.checkpoint.kind == "gguf":
            named = (self.checkpoint.metadata.get(f"general.license{end}") for end in (".name", ""))
            return next((name for name in named if isinstance(name, str)), None)
        card = _text(self._folder / "README.md")
        found = re.search(r"\A---\n.*?^license(?:_name)?:[ \t]*(\S.*?)$.*?^---", card, re.S | re.M)
        if found:
            return found[1].strip("\"' ")
        lines = (line.strip() for file in sorted(self._folder.glob("LICENSE*")) for line in _text(file).splitlines())
        return next((line[:80] for line in lines if line), None)

    def eos(self) -> Any:
        """What generation_config.json names as the end of an answer."""
        name = "generation_config.json"
        if self.checkpoint is not None:
            return self.checkpoint.described(name).get("eos_token_id")
        return read_object(self._folder / name).get("eos_token_id") if (self._folder / name).is_file() else None

    @property
    def _folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        if self.checkpoint is not None:
            self.checkpoint.close()


def open_source(model: str, say: hub.Say = lambda text: None, progress: hub.Progress = lambda event: None) -> Source:
    """model: what `open_session` takes, a config.json, or a folder that holds nothing else. Of a Hub repo that is not
    here only the config.json is fetched. Raises OnDeviceError's children."""
    path = hub.resolve(model, say, progress, config_alone=True)
    alone = _config_alone(path)
    if alone is None:
        checkpoint = open_checkpoint(path)
        try:
            family, hf = family_of(checkpoint)
            return Source(model, path, family, hf, family.config(hf), checkpoint)
        except BaseException:
            checkpoint.close()
            raise
    whole = read_object(alone)
    hf = dict(text_part(whole))
    hf |= {key: whole[key] for key in STORED if whole.get(key) and not hf.get(key)}
    family = family_for(hf, alone)
    return Source(model, alone, family, hf, family.config(hf), None)


def _config_alone(path: Path) -> Path | None:
    """The config.json, where nothing else of the model is here."""
    if path.suffix == ".json" and path.is_file():
        if path.name.endswith(".index.json"):
            raise BadFile(f"{path} lists tensors and says nothing of the model.", "Give its folder or its config.json.")
        return path
    config = path / "config.json"
    weighty = config.is_file() and any(f.suffix in (".safetensors", ".gguf") for f in path.iterdir())
    return config if config.is_file() and not weighty else None


def _text(path: Path) -> str:
    """The beginning of a text file, "" where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_CARD).decode("utf-8", "replace").replace("\r\n", "\n")
    except OSError:
        return ""
