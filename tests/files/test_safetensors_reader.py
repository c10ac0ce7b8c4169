"""Our safetensors reader against the official package, and against headers that lie."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ondevice.checkpoint import safetensors
from ondevice.checkpoint.files import Mapped
from ondevice.errors import BadFile, Unsupported

TYPES = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "uint32", "bool")


def write(path: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_is_what_was_written(tmp_path, dtype):
    values = np.random.default_rng(0).integers(0, 2, (3, 5)).astype(dtype)
    save_file({"x": values, "empty": values[:0], "scalar": np.asarray(values[0, 0])}, tmp_path / "x.safetensors")
    entries = safetensors.read(Mapped(tmp_path / "x.safetensors"))
    tensor = entries["x"].load()
    assert tensor.format.dtype == dtype and np.array_equal(tensor.parts["weight"], values)
    assert entries["empty"].load().shape == (0, 5) and entries["scalar"].load().shape == ()


def test_bfloat16_is_kept_as_bits(tmp_path):
    path = write(tmp_path / "x.safetensors", {"x": entry("BF16", [2], [0, 4])}, b"\x80\x3f\x00\xc0")
    tensor = safetensors.read(Mapped(path))["x"].load()
    assert tensor.format.dtype == "bfloat16" and tensor.parts["weight"].tolist() == [0x3F80, 0xC000]


def test_unaligned_tensors_come_aligned(tmp_path):
    header = {"a": entry("U8", [1], [0, 1]), "b": entry("F32", [1], [1, 5])}
    path = write(tmp_path / "x.safetensors", header, b"\x01" + np.float32(2.5).tobytes())
    values = safetensors.read(Mapped(path))["b"].load().parts["weight"]
    assert values.flags.aligned and values.tolist() == [2.5]


eight = bytes(8)
DAMAGED = {
    "no header": (b"\x01\x02", "shorter than its header"),
    "header longer than the file": ((1 << 62).to_bytes(8, "little") + b"{}", "header of 4611686018427387904 bytes"),
    "not JSON": (b"{]", "not JSON"),
    "not text": (b'{"\xff": 1}', "not JSON"),
    "nested too deep": (b"[" * 200_000, "not JSON"),
    "a number without end": (b'{"x": ' + b"9" * 5000 + b"}", "not JSON"),
    "a list": ([], "not a JSON object"),
    "a name twice": (b'{"x": 1, "x": 2}', "twice"),
    "entry not an object": ({"x": 3}, "'x'"),
    "no dtype": ({"x": {"shape": [2], "data_offsets": [0, 8]}}, "'x'"),
    "shape not a list": ({"x": entry(shape=2)}, "'x'"),
    "negative dimension": ({"x": entry(shape=[-2])}, "shape"),
    "dimension not a number": ({"x": entry(shape=["2"])}, "shape"),
    "dimension a boolean": ({"x": entry(shape=[True, 2])}, "shape"),
    "rank 40": ({"x": entry(shape=[1] * 40)}, "shape"),
    "one offset": ({"x": entry(offsets=[0])}, "'x'"),
    "offsets not numbers": ({"x": entry(offsets=["0", "8"])}, "'x'"),
    "offsets backwards": ({"x": entry(offsets=[8, 0])}, "where its header says"),
    "offsets negative": ({"x": entry(offsets=[-8, 0])}, "where its header says"),
    "offsets beyond the end": ({"x": entry(offsets=[8, 16])}, "where its header says"),
    "size and shape differ": ({"x": entry(shape=[3])}, "where its header says"),
    "product overflows": ({"x": entry(shape=[1 << 32, 1 << 32])}, "shape"),
    "empty but too large": ({"x": entry(shape=[0, 1 << 62], offsets=[0, 0])}, "shape"),
    "overlap": ({"x": entry(), "y": entry(shape=[1], offsets=[4, 8])}, "overlap"),
    "bytes of nobody": ({"x": entry(shape=[1], offsets=[0, 4])}, "belong to no tensor"),
}


@pytest.mark.parametrize(("header", "says"), DAMAGED.values(), ids=DAMAGED)
def test_damage_is_named_and_the_package_agrees(tmp_path, header, says):
    path = tmp_path / "bad.safetensors"
    if isinstance(header, bytes) and says.startswith(("shorter", "header of")):
        path.write_bytes(header)
    else:
        write(path, header, eight)
    with pytest.raises(BadFile, match=says) as caught:
        safetensors.read(Mapped(path))
    assert "bad.safetensors" in caught.value.message and caught.value.hint
    if "rank" not in str(header) and not says.startswith("shape"):  # there the package is more lenient
        with pytest.raises(SafetensorError):
            safe_open(path, "np").__enter__()


def test_a_type_that_is_not_read_is_named(tmp_path):
    path = write(tmp_path / "x.safetensors", {"x": entry("F8_E5M2", [8], [0, 8])}, eight)
    with pytest.raises(Unsupported, match="F8_E5M2"):
        safetensors.read(Mapped(path))


def test_truncation_anywhere_is_found(tmp_path):
    save_file({"x": np.arange(20.0), "y": np.arange(3)}, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "cut.safetensors").write_bytes(whole[:size])
        with pytest.raises(BadFile):
            safetensors.read(Mapped(tmp_path / "cut.safetensors"))
