"""Adapter folders of either kind, recognised, read and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ..checkpoint.write import appearing, write_file
from ..errors import BadFile, BadOption, Unavailable
from . import mlx, peft
from .adapter import Adapter
from .files import CONFIG, read_config
from .modules import Modules

FORMATS: Mapping[str, Callable[[Adapter, Modules], dict[str, bytes]]] = {"peft": peft.files, "mlx": mlx.files}


def adapter_format(path: str | Path) -> str | None:
    """ "peft" or "mlx"; None where no adapter is."""
    folder = Path(path)
    if (folder / "config.json").is_file() or not (folder / CONFIG).is_file():
        return None
    return "mlx" if (folder / mlx.WEIGHTS).is_file() else "peft"


def base_of(path: str | Path) -> str:
    """The model that an adapter's config names, "" where it names none."""
    config = read_config(Path(path))
    return str(config.get("base_model_name_or_path") or config.get("model") or "")


def read_adapter(path: str | Path, modules: Modules) -> Adapter:
    """The adapter in a folder, checked against the model that `modules` describes.

    Raises Unavailable when nothing is there, BadFile for what is damaged, unsafe or does not fit (every mismatch at
    once), Unsupported for kinds that are not read here.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise Unavailable(f"There is no adapter folder {folder}.", "Give a folder with an adapter_config.json.")
    if (folder / peft.WEIGHTS).is_file():
        return peft.read(folder, modules)
    if (folder / mlx.WEIGHTS).is_file():
        return mlx.read(folder, modules)
    raise _no_adapter(folder)


def _no_adapter(folder: Path) -> BadFile:
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".npz"))
    if pickles:
        return BadFile(
            f"{folder} holds its adapter as a pickle only ({pickles[0]}), which could run any code when read.",
            "Get a version with adapter_model.safetensors, or save it again where you trust it: save_pretrained.",
        )
    lacking = "weights (adapter_model.safetensors)" if (folder / CONFIG).is_file() else f"{CONFIG}"
    return BadFile(
        f"{folder} is not an adapter: it has no {lacking}.", "Give a folder that PEFT or mlx-lm has written."
    )


def write_adapter(dest: str | Path, adapter: Adapter, modules: Modules, form: str = "peft") -> None:
    """Write a folder in PEFT's format, or mlx-lm's (form "mlx"); or into one that exists: each file appears whole or
    not at all, the weights last. Raises Unsupported for what has no place there, OnDeviceError if it can't be.
    """
    if form not in FORMATS:
        raise BadOption(f"There is no adapter format {form!r}.", f"Choose from {', '.join(FORMATS)}.")
    dest = Path(dest)
    files = FORMATS[form](adapter, modules)
    if dest.is_dir():
        _write(dest, files)
        return
    with appearing(dest, sum(map(len, files.values()))) as temporary:
        temporary.mkdir()
        _write(temporary, files)


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        write_file(folder / name, content)
