"""What both formats share: dense tensors of an adapter folder in, and out as bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import safetensors
from ..checkpoint.files import Mapped, read_object
from ..checkpoint.write import NAMES
from ..errors import BadFile, OnDeviceError
from ..tensors import STORAGE, Dense, Tensor

CONFIG = "adapter_config.json"
FLOATS = ("float32", "float16", "bfloat16")


def read_config(folder: Path) -> dict[str, Any]:
    return read_object(folder / CONFIG)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, as views of its memory map. BadFile for what is no floats."""
    found = {name: entry.load() for name, entry in safetensors.read(Mapped(path)).items()}
    odd = [f"{name} ({t.format.dtype})" for name, t in found.items() if t.format.dtype not in FLOATS]
    if odd:
        raise BadFile(f"{path} holds {', '.join(odd[:12])}, which no adapter is made of.", "Get the adapter again.")
    return found


def transposed(tensor: Tensor) -> Tensor:
    """The last two axes swapped, as a view."""
    part = tensor.parts["weight"].swapaxes(-1, -2)
    return Tensor(part.shape, tensor.format, {"weight": part})


def stacked(tensors: list[Tensor]) -> Tensor:
    part = np.stack([t.parts["weight"] for t in tensors])
    return Tensor(part.shape, tensors[0].format, {"weight": part})


def tensor(part: np.ndarray, dtype: str) -> Tensor:
    return Tensor(part.shape, Dense(dtype), {"weight": part})


def file_of(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file of dense tensors: the widest numbers first, so that all stay aligned, then by name."""
    names = sorted(tensors, key=lambda name: (-STORAGE[tensors[name].format.dtype].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts, at = [], 0
    for name in names:
        parts.append(np.ascontiguousarray(tensors[name].parts["weight"]).tobytes())
        places = [at, at := at + len(parts[-1])]
        header[name] = {"dtype": NAMES[tensors[name].format.dtype], "shape": list(tensors[name].shape)}
        header[name]["data_offsets"] = places
    described = json.dumps(header, separators=(",", ":")).encode()
    described += b" " * (-len(described) % 8)
    return b"".join([len(described).to_bytes(8, "little"), described, *parts])


def json_of(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()


def unfit(folder: Path, problems: list[str]) -> OnDeviceError:
    return BadFile(
        f"The adapter {folder} does not fit this model: {'; '.join(problems)}.",
        "Give the model that it was trained on; its adapter_config.json or model card names it.",
    )
