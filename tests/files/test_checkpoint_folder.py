"""Hugging Face folders: what is read, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from ondevice import schemes
from ondevice.checkpoint import Summary, open_checkpoint, verify
from ondevice.errors import BadFile, Unsupported
from ondevice.tensors import Affine
from tests.files.small_models import write_hf

INDEX = "model.safetensors.index.json"


def test_tensors_are_what_was_written(hf_folder):
    folder, held = hf_folder
    with open_checkpoint(str(folder)) as model:
        assert model.kind == "huggingface" and model.metadata == {} and model.config["hidden_size"] == 8
        assert set(model.names) == set(held) and "a.weight" in model and "z" not in model
        for name, values in held.items():
            assert np.array_equal(model[name].parts["weight"], values), name


def test_verify_sums_up(hf_folder):
    folder, held = hf_folder
    formats = {"float32": 128, "int64": 56, "float16": 30, "bool": 3}
    assert verify(folder) == Summary("huggingface", 4, sum(v.size for v in held.values()), 217, formats)


def test_side_files_are_data_only(hf_folder):
    folder, _ = hf_folder
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "merges.txt", "modeling.py", "x.bin"):
        (folder / name).write_text("")
    names = ["chat_template.jinja", "merges.txt", "tokenizer.json", "tokenizer.model"]
    assert list(open_checkpoint(folder).files) == names
    assert open_checkpoint(folder).files["merges.txt"] == folder / "merges.txt"


def refused(folder, says, error=BadFile):
    with pytest.raises(error, match=says) as caught:
        open_checkpoint(folder)
    assert caught.value.hint and "\n" not in caught.value.message


@pytest.mark.parametrize(
    "shard",
    ["../model-00001.safetensors", "/etc/model.safetensors", "sub/model.safetensors", "..\\m.safetensors",
     "C:m.safetensors", "model.bin", "..", "", "a\x00.safetensors", "\ud800.safetensors", 7, None],
)  # fmt: skip
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, shard):
    write_hf(tmp_path / "model", 2)
    places = json.loads((tmp_path / "model" / INDEX).read_text())
    places["weight_map"]["a.weight"] = shard
    (tmp_path / "model" / INDEX).write_text(json.dumps(places))
    refused(tmp_path / "model", "'a.weight'")


@pytest.mark.parametrize(
    ("index", "says"),
    [("{}", "no weight_map"), ("[]", "not a JSON object"), ('{"weight_map": []}', "no weight_map"), ("{", "not JSON")],
)
def test_a_damaged_index_is_named(tmp_path, index, says):
    write_hf(tmp_path / "model", 2)
    (tmp_path / "model" / INDEX).write_text(index)
    refused(tmp_path / "model", says)


def test_an_index_and_its_files_must_agree(tmp_path):
    write_hf(tmp_path / "model", 2)
    index = json.loads((tmp_path / "model" / INDEX).read_text())
    index["weight_map"]["ghost"] = "model-00001.safetensors"
    (tmp_path / "model" / INDEX).write_text(json.dumps(index))
    refused(tmp_path / "model", "lacks the tensor 'ghost'")


def test_a_missing_shard_is_named(tmp_path):
    write_hf(tmp_path / "model", 2)
    (tmp_path / "model" / "model-00002.safetensors").unlink()
    with pytest.raises(Exception, match=r"model-00002\.safetensors cannot be read"):
        open_checkpoint(tmp_path / "model")


def test_a_tensor_in_two_files_is_refused(tmp_path):
    write_hf(tmp_path / "model", 2)
    (tmp_path / "model" / INDEX).unlink()
    save_file({"a.weight": np.zeros(3)}, tmp_path / "model" / "zzz.safetensors")
    refused(tmp_path / "model", "'a.weight' is in another file")


def test_pickles_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    refused(tmp_path, "pickle")


def test_incomplete_folders_say_what_is_missing(tmp_path):
    refused(tmp_path, r"no config\.json")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BadFile, match="adapter"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, r"no \.safetensors")
    (tmp_path / "model.safetensors").touch()
    refused(tmp_path, "is empty")
    refused(tmp_path / "model.safetensors", "alone is not a model")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"1" * 9000 + b"}"])
def test_a_damaged_config_is_named(hf_folder, content):
    folder, _ = hf_folder
    (folder / "config.json").write_bytes(content)
    refused(folder, r"config\.json is damaged")


# ------------------------------------------------------------------------------------------------ MLX's convention

WIDE = np.random.default_rng(0).normal(size=(4, 128)).astype(np.float32)


def write_mlx(folder, quantization, spoil=lambda tensors: None, key="quantization"):
    """One module of 4 bits in groups of 64, one of 8 bits in groups of 32, one dense."""
    four, eight = schemes.quantize_affine(WIDE, 4, 64, "float16"), schemes.quantize_affine(WIDE, 8, 32, "float32")
    tensors = {f"m.four.{part}": values for part, values in four.parts.items()}
    tensors |= {f"m.eight.{part}": values for part, values in eight.parts.items()}
    tensors |= {"m.four.bias": np.zeros(4, np.float32), "norm.weight": np.ones(4, np.float32)}
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({key: quantization}))
    return four, eight


GOOD = {"bits": 4, "group_size": 64, "m.eight": {"bits": 8, "group_size": 32}, "norm": False}


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_mlx_triples_become_one_tensor(tmp_path, key):
    four, eight = write_mlx(tmp_path, GOOD, key=key)
    model = open_checkpoint(tmp_path)
    assert set(model.names) == {"m.four.weight", "m.four.bias", "m.eight.weight", "norm.weight"}
    for name, tensor in (("m.four.weight", four), ("m.eight.weight", eight)):
        assert model[name].shape == tensor.shape and model[name].format == tensor.format
        assert all(np.array_equal(model[name].parts[part], values) for part, values in tensor.parts.items())
    assert model["m.eight.weight"].format == Affine(8, 32, "float32")
    assert not model["norm.weight"].quantized


BAD = {
    "wrong bits": (GOOD | {"bits": 3}, "does not fit"),
    "wrong group": (GOOD | {"group_size": 32}, "does not fit"),
    "bits unknown": (GOOD | {"bits": 7}, "7 bits"),
    "bits not a number": (GOOD | {"bits": "4"}, "'4' bits"),
    "bits a float": (GOOD | {"bits": 4.0}, r"4\.0 bits"),
    "group zero": (GOOD | {"group_size": 0}, "groups of 0"),
    "nothing said": ({"m.eight": GOOD["m.eight"]}, "None bits"),
    "said to be dense": (GOOD | {"m.eight": False}, "False for 'm.eight'"),
    "not an object": ("4 bits", "not an object"),
}


@pytest.mark.parametrize(("quantization", "says"), BAD.values(), ids=BAD)
def test_a_quantization_that_does_not_fit_is_named(tmp_path, quantization, says):
    write_mlx(tmp_path, quantization)
    refused(tmp_path, says)


SPOILED = {
    "no biases": (lambda t: t.pop("m.four.biases"), "do not match"),
    "biases of another shape": (lambda t: t.update({"m.four.biases": np.zeros((4, 1), np.float16)}), "do not match"),
    "biases of another type": (lambda t: t.update({"m.four.biases": np.zeros((4, 2), np.float32)}), "do not match"),
    "scales of integers": (
        lambda t: t.update({f"m.four.{p}": np.zeros((4, 2), np.int32) for p in ("scales", "biases")}),
        "are int32",
    ),
    "scales without rank": (
        lambda t: t.update({f"m.four.{p}": np.zeros((), np.float16) for p in ("scales", "biases")}),
        "does not fit",
    ),
}


@pytest.mark.parametrize(("spoil", "says"), SPOILED.values(), ids=SPOILED)
def test_parts_that_do_not_match_are_named(tmp_path, spoil, says):
    write_mlx(tmp_path, GOOD, spoil)
    refused(tmp_path, says)


@pytest.mark.parametrize(
    "quantization",
    [{"quant_method": "gptq", "bits": 4}, GOOD | {"mode": "mxfp4"}, GOOD | {"m.eight": {"mode": "nvfp4"}}],
)
def test_other_quantizations_are_named(tmp_path, quantization):
    write_mlx(tmp_path, quantization)
    refused(tmp_path, "not read here", Unsupported)
