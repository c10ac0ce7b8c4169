"""Writing a Hugging Face folder: streamed tensor by tensor, in a temporary sibling that is renamed when all is there.

Dense tensors are plain safetensors; Affine ones follow MLX's convention (weight, scales, biases, and what they are in
config.json's `quantization`), and so do MXFP4 blocks (weight, scales), so that mlx-lm reads the folder.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import OnDeviceError, Unsupported
from ..schemes import mxfp4_parts, row_bytes
from ..tensors import STORAGE, Affine, Blocks, Dense, Tensor
from .files import release
from .folder import INDEX
from .safetensors import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}  # our dtype -> safetensors' name
SHARD_BYTES = 5 << 30
MXFP4 = Blocks("MXFP4")
WIDEST = 10**15  # stands for any offset when room for a header is set aside


@dataclass(frozen=True)
class Spec:
    """A tensor to be written: what it will be, and how to get it when its turn comes.

    load() returns a Tensor of this shape and format; only an Affine's scales may come in another dtype than planned.
    of: what it holds, by names that whoever planned it understands.
    """

    name: str
    shape: tuple[int, ...]
    format: Dense | Affine | Blocks
    load: Callable[[], Tensor]
    of: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What is written: name in the file -> dtype and shape. Raises Unsupported for what has no place there."""
        form, name = self.format, self.name
        if isinstance(form, Dense):
            return {name: (form.dtype, self.shape)}
        module, _, last = name.rpartition(".")
        if form == MXFP4 and last == "weight":
            *rows, columns = self.shape
            return {name: ("uint32", (*rows, columns // 8)), f"{module}.scales": ("uint8", (*rows, columns // 32))}
        if not isinstance(form, Affine) or last != "weight":
            raise Unsupported(f"{name} ({form}) has no place in a safetensors file.", "Convert it to a dense type.")
        *rows, columns = self.shape
        groups = (*rows, columns // form.group_size)
        packed = ("uint32", (*rows, columns * form.bits // 32))
        return {name: packed, f"{module}.scales": (form.dtype, groups), f"{module}.biases": (form.dtype, groups)}

    @property
    def nbytes(self) -> int:
        """Bytes as planned."""
        if isinstance(self.format, Blocks):
            return math.prod(self.shape[:-1]) * row_bytes(self.format.kind, self.shape[-1])
        return sum(
            int(np.prod(shape, dtype=np.int64)) * STORAGE[dtype].itemsize for dtype, shape in self.parts.values()
        )


def write_folder(
    dest: str | Path,
    config: Mapping[str, Any],
    specs: Sequence[Spec],
    side_files: Mapping[str, bytes],
    shard_bytes: int = SHARD_BYTES,
    written: Callable[[Spec], None] = lambda spec: None,
) -> None:
    """Write config.json, the tensors and the side files as the new folder `dest`; `written` is told of each tensor.

    Peak memory is one tensor. `dest` appears complete or not at all: whatever goes wrong, Ctrl-C included, nothing is
    left. Raises OnDeviceError when `dest` exists, its parent doesn't, or the disk is too small, full or failing.
    """
    dest = Path(dest)
    with appearing(dest, sum(spec.nbytes for spec in specs)) as temporary:
        temporary.mkdir()
        _write_shards(temporary, _shards(specs, shard_bytes), written)
        files = {"config.json": _json(_with_quantization(with_older_keys(config), specs)), **side_files}
        for name, content in files.items():
            with _durable(temporary / name) as file:
                file.write(content)


@contextmanager
def appearing(dest: Path, nbytes: int) -> Iterator[Path]:
    """A temporary path beside `dest`: the folder or file that the block makes there becomes `dest` if the block ends
    well and vanishes if not. Raises OnDeviceError as `write_folder` does."""
    parent = require_new(dest)
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise OnDeviceError(
            f"{dest} needs {nbytes >> 20} MiB, but its disk has {free >> 20} MiB left.",
            "Free some, or choose another disk.",
        )
    temporary = parent / f".{dest.name}.{secrets.token_hex(4)}.partial"
    try:
        yield temporary
        _sync(temporary)
        temporary.rename(dest)
        _sync(parent)
    except BaseException as error:
        _remove(temporary)
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise OnDeviceError(
                f"{dest} could not be written: {reason}.",
                "Nothing was left behind. Free space or check rights, then repeat.",
            ) from error
        raise


def require_new(dest: Path) -> Path:
    """The folder in which `dest` is to appear. Raises OnDeviceError where something is at `dest`, or no such folder."""
    if dest.exists() or dest.is_symlink():
        raise OnDeviceError(f"{dest} exists already.", "Choose another name, or remove it first.")
    parent = dest.absolute().parent
    if not parent.is_dir():
        raise OnDeviceError(f"There is no folder {parent} to write to.", "Create it first.")
    return parent


@contextmanager
def scratch(dest: Path) -> Iterator[Path]:
    """A hidden folder beside `dest`, for what is made on the way to it; gone at the end, whatever happens. Raises
    OnDeviceError where the disk is full or nothing may be written there."""
    try:
        with tempfile.TemporaryDirectory(
            prefix=f".{dest.name}.", suffix=".partial", dir=dest.absolute().parent, ignore_cleanup_errors=True
        ) as folder:
            yield Path(folder)
    except OSError as error:
        raise OnDeviceError(
            f"{dest} could not be written: {error.strerror or error}.",
            "Nothing was left behind. Free space or check rights, then repeat.",
        ) from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def write_file(dest: Path, content: bytes) -> None:
    """A small file, new or in an old one's place: whole or not at all. Raises OnDeviceError."""
    temporary = dest.parent / f".{dest.name}.{secrets.token_hex(4)}.partial"
    try:
        with _durable(temporary) as file:
            file.write(content)
        temporary.replace(dest)
        _sync(dest.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OnDeviceError(f"{dest} could not be written: {reason}.", "Choose another place.") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def _durable(path: Path) -> Iterator[BinaryIO]:
    """A new file whose bytes are on the disk when the block ends."""
    with open(path, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """What is at `path` is on the disk, its entries' names if it is a folder."""
    if os.name == "posix":  # elsewhere a folder can't be opened, and need not be
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


# ------------------------------------------------------------------------------------------------ weights


def _shards(specs: Sequence[Spec], most: int) -> list[list[Spec]]:
    """Specs in order, cut where a file would grow beyond `most` bytes."""
    shards: list[list[Spec]] = [[]]
    size = 0
    for spec in specs:
        if size + spec.nbytes > most and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def _write_shards(folder: Path, shards: list[list[Spec]], written: Callable[[Spec], None]) -> None:
    places: dict[str, str] = {}
    total = 0
    for number, specs in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        entries = _write_shard(folder / name, specs, written)
        total += max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        places |= dict.fromkeys(entries, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        with _durable(folder / INDEX) as file:
            file.write(_json(index))


def _write_shard(path: Path, specs: list[Spec], written: Callable[[Spec], None]) -> dict[str, dict]:
    """One safetensors file. Room for the header is set aside first and filled last, when all offsets are known."""
    # The format forbids holes, so tensors stay aligned only if those of odd sizes come last, the widest first.
    specs = sorted(specs, key=lambda spec: (spec.nbytes % 8 != 0, -_itemsize(spec)))
    room = len(
        _header(
            {name: _header_entry("bfloat16", shape, WIDEST, 0) for s in specs for name, (_, shape) in s.parts.items()}
        )
    )
    room += -room % 8
    entries: dict[str, dict] = {}
    at = 0
    with _durable(path) as file:
        file.seek(8 + room)
        for spec in specs:
            for name, dtype, part in _stored(spec):
                entries[name] = _header_entry(dtype, part.shape, at, part.nbytes)
                file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
                at += part.nbytes
                del part  # else it would stay in memory while the next tensor is made
            written(spec)
        file.seek(0)
        file.write(room.to_bytes(8, "little") + _header(entries).ljust(room))
    return entries


def _itemsize(spec: Spec) -> int:
    return max(STORAGE[dtype].itemsize for dtype, _ in spec.parts.values())


def _stored(spec: Spec) -> Iterator[tuple[str, str, np.ndarray]]:
    """Name, dtype and array of each part, loaded, checked against the plan, and let go of at the end."""
    tensor = spec.load()
    form, planned = tensor.format, spec.format
    if isinstance(form, Affine) and isinstance(planned, Affine):
        planned = Affine(planned.bits, planned.group_size, form.dtype)
    if (tensor.shape, form) != (spec.shape, planned):
        raise ValueError(f"{spec.name} came as {form} {tensor.shape}, not as planned")
    parts = Spec(spec.name, spec.shape, form, spec.load).parts
    arrays = mxfp4_parts(tensor) if form == MXFP4 else tensor.parts.values()
    for (name, (dtype, _)), part in zip(parts.items(), arrays, strict=True):
        yield name, dtype, part
    release(tensor)


def _header_entry(dtype: str, shape: Sequence[int], begin: int, nbytes: int) -> dict:
    return {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, begin + nbytes]}


def _header(entries: dict[str, dict]) -> bytes:
    return json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()


# ------------------------------------------------------------------------------------------------ config.json


def with_older_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json that programs which do not know transformers 5's keys read too, mlx-lm among them: how positions turn
    stands beside `rope_parameters` as it stood before, and two sizes under the names that they insist on."""
    rule = config.get("rope_parameters")
    rule = rule if isinstance(rule, Mapping) else {}
    main, local = rule.get("full_attention", rule), rule.get("sliding_attention", {})
    older = {key: main.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    if main is not rule:
        older["rope_local_base_freq"] = local.get("rope_theta")
    older |= {"n_ctx": config.get("n_positions"), "num_experts": config.get("num_local_experts")}
    older["block_dim"] = config.get("hidden_size") if "block_multiple_of" in config else None
    older = {key: value for key, value in older.items() if value is not None}
    if rule and main is rule:
        scaled = rule.get("rope_type", "default") != "default"
        older["rope_scaling"] = {k: v for k, v in rule.items() if k != "rope_theta"} if scaled else None
    return older | dict(config)


def _with_quantization(config: Mapping[str, Any], specs: Sequence[Spec]) -> dict[str, Any]:
    """config.json that says how the tensors are stored: MLX's block with the most common setting as the default and
    each module that differs by name. It stands under both names, as mlx-lm writes it."""
    plain = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    settings = {
        spec.name.removesuffix(".weight"): _setting(spec.format) for spec in specs if not isinstance(spec.format, Dense)
    }
    if not settings:
        return plain
    usual = max(settings.values(), key=list(settings.values()).count)
    block = usual | {name: own for name, own in settings.items() if own != usual}
    return plain | {"quantization": block, "quantization_config": block}


def _setting(form: Affine | Blocks) -> dict[str, Any]:
    if form == MXFP4:
        return {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    return {"group_size": form.group_size, "bits": form.bits, "mode": "affine"}
