"""Folders we write: readable by everyone, complete or absent, one tensor in memory at a time."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import safe_open

from ondevice import schemes
from ondevice.checkpoint import Spec, open_checkpoint, verify, write, write_folder
from ondevice.errors import OnDeviceError, Unsupported
from ondevice.tensors import Affine, Blocks, Dense, Tensor, dense

RNG = np.random.default_rng(0)
TENSORS = {
    "odd.weight": dense(RNG.normal(size=(3, 3)).astype(np.float16)),
    "a.weight": schemes.quantize_affine(RNG.normal(size=(5, 64)), 4, 64, "float16"),
    "b.weight": schemes.quantize_affine(RNG.normal(size=(2, 3, 64)), 3, 32, "bfloat16"),
    "c.weight": schemes.quantize_affine(RNG.normal(size=(4, 64)), 4, 64, "float16"),
    "flag": dense(np.array([True, False, True])),
    "norm.weight": dense(RNG.normal(size=7).astype(np.float32)),
    "steps": dense(np.arange(3)),
}


def specs(tensors=TENSORS):
    return [Spec(name, t.shape, t.format, lambda t=t: t) for name, t in tensors.items()]


@pytest.mark.parametrize("shard_bytes", [1, 300, 1 << 30])
def test_what_is_written_is_read_back(tmp_path, shard_bytes):
    told = []
    write_folder(tmp_path / "m", {"hidden_size": 8}, specs(), {"tokenizer.json": b"{}"}, shard_bytes, told.append)
    model = open_checkpoint(tmp_path / "m")
    assert {spec.name for spec in told} == set(model.names) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert (model[name].shape, model[name].format) == (tensor.shape, tensor.format)
        assert all(np.array_equal(model[name].parts[part], values) for part, values in tensor.parts.items())
    assert model.nbytes == sum(spec.nbytes for spec in specs())
    assert model.files["tokenizer.json"].read_bytes() == b"{}"
    assert model.config["hidden_size"] == 8
    assert sorted(os.listdir(tmp_path)) == ["m"]


@pytest.mark.parametrize("shard_bytes", [300, 1 << 30])
def test_the_official_reader_agrees(tmp_path, shard_bytes):
    write_folder(tmp_path / "m", {}, specs(), {}, shard_bytes)
    pytest.importorskip("torch")  # NumPy has no bfloat16
    read = {}
    for file in (tmp_path / "m").glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            read |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    assert {"a.weight", "a.scales", "a.biases", "norm.weight"} <= set(read)
    assert np.array_equal(np.asarray(read["norm.weight"]), TENSORS["norm.weight"].parts["weight"])
    index = tmp_path / "m" / "model.safetensors.index.json"
    if index.exists():
        assert set(json.loads(index.read_text())["weight_map"]) == set(read)


def test_every_tensor_lies_aligned(tmp_path):
    write_folder(tmp_path / "m", {}, specs(), {})
    raw = (tmp_path / "m" / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    sizes = {"U32": 4, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "BOOL": 1}
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            assert (8 + length + entry["data_offsets"][0]) % sizes[entry["dtype"]] == 0, name


def test_quantization_names_what_differs(tmp_path):
    write_folder(tmp_path / "m", {"quantization": "old", "x": 1}, specs(), {})
    config = open_checkpoint(tmp_path / "m").config
    three = {"group_size": 32, "bits": 3, "mode": "affine"}
    assert config["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine", "b": three}
    assert config["quantization_config"] == config["quantization"] and config["x"] == 1


def test_a_dense_model_has_no_quantization(tmp_path):
    dense_only = {"norm.weight": TENSORS["norm.weight"]}
    write_folder(tmp_path / "m", {"quantization": {"bits": 4}, "quantization_config": {}}, specs(dense_only), {})
    assert open_checkpoint(tmp_path / "m").config == {}


def test_scales_may_come_wider_than_planned(tmp_path):
    wide = schemes.quantize_affine(RNG.normal(size=(5, 64)), 4, 64, "float32")
    planned = Spec("a.weight", wide.shape, Affine(4, 64, "float16"), lambda: wide)
    write_folder(tmp_path / "m", {}, [planned, *specs()[2:]], {})
    assert open_checkpoint(tmp_path / "m")["a.weight"].format == wide.format


def test_mlx_lm_reads_it(tmp_path):
    utils = pytest.importorskip("mlx_lm.utils")
    import mlx.core as mx

    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 128, "vocab_size": 96,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    linear = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64)}
    linear |= {"self_attn.o_proj": (64, 64), "mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64)}
    shapes = {f"model.layers.0.{name}.weight": shape for name, shape in (linear | {"mlp.down_proj": (64, 128)}).items()}
    tensors = {n: schemes.quantize_affine(RNG.normal(size=s), 4, 32, "float16") for n, s in shapes.items()}
    tensors["model.embed_tokens.weight"] = schemes.quantize_affine(RNG.normal(size=(96, 64)), 8, 64, "float16")
    norms = ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm")
    tensors |= {f"{name}.weight": dense(np.ones(64, np.float16)) for name in norms}
    write_folder(tmp_path / "m", config, specs(tensors), {}, shard_bytes=9000)
    model, _ = utils.load_model(tmp_path / "m")
    down = model.model.layers[0].mlp.down_proj
    scales, biases = (down[part].astype(mx.float32) for part in ("scales", "biases"))
    values = mx.dequantize(down.weight, scales, biases, 32, 4)
    expected = schemes.to_float(tensors["model.layers.0.mlp.down_proj.weight"])
    assert np.array_equal(np.array(values), expected)
    assert model.model.embed_tokens.bits == 8 and model(mx.array([[1, 2, 3]])).shape == (1, 3, 96)


# ------------------------------------------------------------------------------------------------ when it goes wrong


def failing(error: BaseException) -> list[Spec]:
    def load() -> Tensor:
        raise error

    return [*specs(), Spec("last", (3,), Dense("float32"), load)]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), ValueError("x")])
def test_whatever_fails_nothing_is_left(tmp_path, error):
    with pytest.raises(type(error)):
        write_folder(tmp_path / "m", {}, failing(error), {})
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_said_and_nothing_is_left(tmp_path, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(write.os, "fsync", full)
    with pytest.raises(OnDeviceError, match="No space left on device") as caught:
        write_folder(tmp_path / "m", {}, specs(), {})
    assert "Nothing was left" in caught.value.hint and os.listdir(tmp_path) == []


def test_a_disk_too_small_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(OnDeviceError, match="its disk has 0 MiB left"):
        write_folder(tmp_path / "m", {}, failing(AssertionError("loaded")), {})


def test_an_existing_destination_is_refused(tmp_path):
    for name in ("folder", "file"):
        (tmp_path / name).mkdir() if name == "folder" else (tmp_path / name).touch()
        with pytest.raises(OnDeviceError, match="exists already"):
            write_folder(tmp_path / name, {}, specs(), {})
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OnDeviceError, match="exists already"):
        write_folder(tmp_path / "dangling", {}, specs(), {})


def test_a_missing_parent_is_refused(tmp_path):
    with pytest.raises(OnDeviceError, match="no folder"):
        write_folder(tmp_path / "a" / "m", {}, specs(), {})


def test_blocks_have_no_place_in_safetensors(tmp_path):
    blocks = Tensor((1, 256), Blocks("Q4_K"), {"weight": np.zeros((1, 144), np.uint8)})
    with pytest.raises(Unsupported, match="Q4_K"):
        write_folder(tmp_path / "m", {}, specs({"x.weight": blocks}), {})
    assert os.listdir(tmp_path) == []


def test_a_tensor_that_is_not_as_planned_is_a_mistake_of_ours(tmp_path):
    with pytest.raises(ValueError, match="not as planned"):
        write_folder(tmp_path / "m", {}, [Spec("x", (4,), Dense("float32"), lambda: dense(np.zeros(3)))], {})


STREAM = """
import resource, sys
import numpy as np
from ondevice.checkpoint import Spec, write_folder
from ondevice.tensors import Dense, dense
form = Dense("float32")
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = peak()
specs = [Spec(f"t{i}", (1 << 21,), form, lambda: dense(np.ones(1 << 21, np.float32))) for i in range(24)]
write_folder(sys.argv[1], {}, specs, {}, written=lambda spec: print(spec.name, flush=True))
print(peak() - before)
"""


def start(dest: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", STREAM, str(dest)], stdout=subprocess.PIPE, text=True)


def test_one_tensor_in_memory_at_a_time(tmp_path):
    output = start(tmp_path / "m").communicate(timeout=60)[0]
    assert int(output.split()[-1]) < 40  # MiB, for 192 MiB of tensors of 8 MiB each
    assert verify(tmp_path / "m").nbytes == 192 << 20


@pytest.mark.slow
def test_killed_at_any_moment_the_folder_is_whole_or_absent(tmp_path):
    for tensors in range(1, 25, 3):
        dest = tmp_path / str(tensors)
        process = start(dest)
        for _ in range(tensors):
            process.stdout.readline()
        time.sleep(0.005 * tensors)
        process.kill()
        process.wait()
        assert not dest.exists() or verify(dest).tensors == 24
