"""What is wrong with a model is said in two lines, all of it at once, and never as a traceback of our own."""

from __future__ import annotations

import copy
import itertools
import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ondevice import installed, registry
from ondevice.backends.base import Step
from ondevice.backends.reference import create as create_reference
from ondevice.checkpoint import open_checkpoint
from ondevice.errors import BadFile, OnDeviceError, Unsupported
from ondevice.registry import families
from ondevice.testing.family import open_decoder
from tests.models import gguf_twins, twins


@pytest.fixture
def folder(request, twin_folder, tmp_path) -> Path:
    """A copy of a twin's folder, to be spoiled; `llama` unless parametrised."""
    _, original = twin_folder(getattr(request, "param", "llama"))
    for file in original.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change_config(folder: Path, **fields: Any) -> None:
    place = folder / "config.json"
    hf = json.loads(place.read_text()) | fields
    place.write_text(json.dumps({k: v for k, v in hf.items() if v is not ...}, default=str))


def refusal(folder: Path, kind: type[OnDeviceError] = BadFile) -> OnDeviceError:
    """The error of opening the model, after a look at its form."""
    with pytest.raises(OnDeviceError) as caught:
        open_decoder(folder, create_reference())
    error = caught.value
    assert type(error) is kind, f"{type(error).__name__}: {error}"
    assert error.message and error.hint
    assert "\n" not in error.message + error.hint
    assert len(error.message) < 4000
    return error


def test_an_unknown_family_is_told_which_are_known(folder):
    change_config(folder, model_type="lama")
    error = refusal(folder, Unsupported)
    assert "lama" in error.message and "Did you mean 'llama'?" in error.hint
    change_config(folder, model_type="bert-for-cats")
    error = refusal(folder, Unsupported)
    assert all(known in error.hint for known in ("llama", "qwen3", "qwen3_moe", "gemma3_text", "docs/families.md"))


def test_an_unknown_family_is_told_which_are_like_it(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {f"model.layers.{i}.mlp.scale": np.ones(7, np.float32) for i in range(3)},
              folder / "model.safetensors")  # fmt: skip
    change_config(folder, model_type="llamoid")
    message = refusal(folder, Unsupported).message
    assert "Most like it: " in message and "llama (not used: model.layers.*.mlp.scale)" in message
    save_file({"a": np.ones(7, np.float32)}, folder / "model.safetensors")
    assert "like" not in refusal(folder, Unsupported).message


def test_an_unknown_architecture_is_told_which_are_like_it(tmp_path):
    class Renamed(gguf.GGUFWriter):
        def __init__(self, path, architecture):
            super().__init__(path, "novel")

    gguf_twins.write(tmp_path / "x.gguf", twins.make("qwen3"), writer_class=Renamed)
    assert "qwen3 (its tensors have the same names)" in refusal(tmp_path / "x.gguf", Unsupported).message


@pytest.mark.parametrize("model_type", [None, 3, ["llama"], {}, "x" * 10000, ...])
def test_a_model_type_that_is_none(folder, model_type):
    change_config(folder, model_type=model_type)
    refusal(folder, Unsupported)


def test_a_broken_plug_in_takes_nothing_down_and_is_named(folder, monkeypatch, request):
    broken = installed.Entry("broken", "no_such_module:family")
    entries = installed.entry_points("ondevice.families")
    monkeypatch.setattr(installed, "entry_points", lambda group: entries | {"broken": broken})
    registry._families.cache_clear()
    request.addfinalizer(registry._families.cache_clear)
    open_decoder(folder, create_reference())
    change_config(folder, model_type="unheard of")
    assert "The plug-in broken failed: ModuleNotFoundError" in refusal(folder, Unsupported).hint


def test_two_families_of_one_type(folder, monkeypatch):
    llama = families()["llama"]
    monkeypatch.setattr(registry, "_families", lambda: ({"llama": llama, "llama2": llama}, {}))
    assert "llama and llama2 both claim" in refusal(folder, Unsupported).message


def test_an_unknown_gguf_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "clip")
    writer.add_tensor("a", np.zeros(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    error = refusal(tmp_path / "x.gguf", Unsupported)
    assert "'clip'" in error.message and "gemma3" in error.hint


def test_all_mismatches_are_told_at_once(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"], tensors["model.layers.2.mlp.up_proj.weight"]
    tensors["model.layers.1.self_attn.k_proj.weight"] = np.zeros((3, 4), np.float32)
    tensors["model.norm.weight"] = np.zeros(7, np.float32)
    tensors["model.embed_tokens.weight"] = np.zeros(61, np.float32)  # a row is not a matrix of one
    tensors["model.layers.1.extra.weight"] = np.zeros(7, np.float32)
    save_file(tensors, folder / "model.safetensors")
    message = refusal(folder).message
    for expected in (
        str(folder),
        "missing: model.layers.0.self_attn.q_proj.weight, model.layers.2.mlp.up_proj.weight;",
        "not used: model.layers.1.extra.weight;",
        "model.embed_tokens.weight is [61], not [61, 36]",
        "model.layers.1.self_attn.k_proj.weight is [3, 4], not [16, 36]",
        "model.norm.weight is [7], not [36]",
    ):
        assert expected in message


@pytest.mark.parametrize("folder", ["qwen3_moe"], indirect=True)
@pytest.mark.parametrize("experts", [3, 6])
def test_experts_too_many_or_too_few(folder, experts):
    change_config(folder, num_local_experts=experts)
    message = refusal(folder).message
    assert ("missing" in message) == (experts == 6)


def test_a_wrong_size_names_a_dozen_tensors_and_counts_the_rest(folder):
    change_config(folder, hidden_size=40)
    message = refusal(folder).message
    assert "[61, 36], not [61, 40]" in message and " more" in message


def test_a_quantized_vector_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors |= {
        "model.norm.weight": np.zeros(4, np.uint32),
        "model.norm.scales": np.ones(1, np.float32),
        "model.norm.biases": np.ones(1, np.float32),
    }
    save_file(tensors, folder / "model.safetensors")
    change_config(folder, hidden_size=32, quantization={"bits": 4, "group_size": 32})
    assert "model.norm.weight is quantized" in refusal(folder).message


@pytest.mark.parametrize(
    ("fields", "kind", "said"),
    [
        ({"num_key_value_heads": 4}, BadFile, "6 attention heads, which 4 key/value heads"),
        ({"head_dim": None, "num_attention_heads": 8}, BadFile, "hidden_size = 36, which 8 attention heads"),
        ({"head_dim": 7}, BadFile, "heads of 7"),
        ({"head_dim": 1}, BadFile, "heads of 1"),
        ({"partial_rotary_factor": 1.5}, BadFile, "12 cannot turn"),
        ({"layer_types": ["full_attention"]}, BadFile, "num_hidden_layers = 3 and 1 layer_types"),
        ({"layer_types": ["full_attention"] * 2 + ["linear_attention"]}, Unsupported, "linear_attention"),
        ({"layer_types": ["sliding_attention"] * 3}, BadFile, "no sliding_window"),
        ({"hidden_act": "snake"}, Unsupported, "hidden_act = 'snake'"),
        ({"rope_parameters": {"rope_type": "warp", "factor": 2}}, Unsupported, "rope_type = 'warp'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "su"}}, Unsupported, "type = 'su'"),
        ({"rope_parameters": {"rope_type": "linear"}}, BadFile, "no factor"),
        ({"rope_parameters": twins.LLAMA3 | {"low_freq_factor": 4.0}}, BadFile, "low_freq_factor = 4.0"),
        ({"rope_parameters": twins.LLAMA3 | {"factor": 0}}, BadFile, "factor = 0"),
        ({"rope_parameters": "fast"}, BadFile, "rope_parameters = 'fast'; an object"),
        ({"rope_parameters": {"rope_theta": -1.0}}, BadFile, "rope_theta = -1.0; a positive number"),
        ({"vocab_size": ...}, BadFile, "no vocab_size; a whole number"),
        ({"hidden_size": "36"}, BadFile, "hidden_size = '36'; a whole number"),
        ({"num_hidden_layers": 10**9}, BadFile, "num_hidden_layers = 1000000000"),
        ({"max_position_embeddings": 2.5}, BadFile, "max_position_embeddings = 2.5"),
        ({"rms_norm_eps": float("nan")}, BadFile, "rms_norm_eps = nan; a positive number"),
        ({"rms_norm_eps": 10**400}, BadFile, "rms_norm_eps = 1000"),
        ({"tie_word_embeddings": "yes"}, BadFile, "tie_word_embeddings = 'yes'; true or false"),
        ({"attention_bias": 1}, BadFile, "attention_bias = 1; true or false"),
    ],
)  # fmt: skip
def test_configs_that_cannot_be(folder, fields, kind, said):
    change_config(folder, **fields)
    assert said in refusal(folder, kind).message


@pytest.mark.parametrize("folder", ["qwen3_moe"], indirect=True)
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_experts_per_tok": 6}, "5 experts and num_experts_per_tok = 6"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step = 0"),
        ({"mlp_only_layers": "all"}, "mlp_only_layers = 'all'; a list of whole numbers"),
        ({"num_local_experts": None}, "no num_local_experts"),
    ],
)
def test_experts_that_cannot_be(folder, fields, said):
    change_config(folder, **fields)
    assert said in refusal(folder).message


@pytest.mark.parametrize("folder", ["gemma3"], indirect=True)
def test_a_gemma_that_looks_both_ways_is_refused(folder):
    change_config(folder, use_bidirectional_attention=True)
    assert "both ways" in refusal(folder, Unsupported).message


ODD = (
    "x", "", -1, 0, 1, 2, 1.5, -0.5, 1e308, float("inf"), float("nan"), 10**30, 2**31, 2**63, 1 << 16, None, True,
    False, [], [1], ["x"], [None], {}, {"a": 1}, {"rope_type": "linear"}, {"rope_type": "llama3", "factor": "8"},
    {"rope_type": ["x"]}, {"full_attention": 3}, {"full_attention": {"rope_theta": []}},
)  # fmt: skip


def spoil(hf: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """One to three values, in the config or in an object within it, become something else or go."""
    hf = copy.deepcopy(hf)
    for _ in range(draw.choice((1, 1, 2, 3))):
        inner = [v for v in hf.values() if isinstance(v, dict) and v]
        within = draw.choice(inner) if inner and draw.random() < 0.25 else hf
        key = draw.choice(sorted(within))
        if draw.random() < 0.1:
            del within[key]
        else:
            within[key] = copy.deepcopy(draw.choice(ODD))
    return hf


def opens_or_says_why(path: Path) -> bool:
    """Opens the model and runs it; whether it was refused. Anything but OnDeviceError gets through."""
    try:
        decoder = open_decoder(path, create_reference())
        decoder(decoder.ops.array(np.zeros((1, 4), np.int32)), Step.whole(1, 4))
    except OnDeviceError as error:
        assert error.hint and "\n" not in error.message + error.hint, error
        return True
    return False


@pytest.mark.parametrize(
    "name",
    [
        "llama-rope3",
        "qwen3-window",
        "gemma3-full",
        "qwen3_moe-some",
        "phi3-long",
        "deepseek_v3",
        "gpt_oss-yarn",
        "gpt2",
    ],
)
@pytest.mark.parametrize("older", [False, True])
def test_spoilt_configs(name, older, twin_folder, tmp_path):
    _, original = twin_folder(name)
    (tmp_path / "model.safetensors").symlink_to(original / "model.safetensors")
    hf = json.loads((original / "config.json").read_text())
    hf = twins.published(hf) if older else hf
    draw, refused = random.Random(f"{name}{older}"), 0
    for _ in range(100):
        (tmp_path / "config.json").write_text(json.dumps(spoil(hf, draw)))
        refused += opens_or_says_why(tmp_path)
    assert refused > 25


VALUES = gguf.GGUFValueType
ODD_METADATA = (
    None, (0, VALUES.UINT32), (-1, VALUES.INT32), (float("nan"), VALUES.FLOAT32), ("x", VALUES.STRING),
    ([1, 2], VALUES.ARRAY), (1 << 40, VALUES.UINT64),
)  # fmt: skip


SLOWLY = pytest.param("deepseek_v2-yarn", marks=pytest.mark.slow)


class SpoilingWriter(gguf.GGUFWriter):
    """Writes something else than it is told for one key, or leaves it out."""

    def __init__(self, path: Path, architecture: str, key: str, instead: tuple[Any, VALUES] | None):
        self.key, self.instead = key, instead
        super().__init__(path, architecture)

    def add_key_value(self, key: str, val: Any, vtype: VALUES, sub_type: VALUES | None = None) -> None:
        if key != self.key:
            super().add_key_value(key, val, vtype, sub_type)
        elif self.instead:
            super().add_key_value(key, *self.instead, VALUES.INT32 if self.instead[1] == VALUES.ARRAY else None)


@pytest.mark.parametrize(
    ("key", "instead", "kind", "said"),
    [
        ("llama.rope.dimension_count", (3, VALUES.UINT32), BadFile, "heads of 8, of which 3 cannot turn"),
        ("llama.rope.scaling.type", ("warp", VALUES.STRING), Unsupported, "rope_type = 'warp'"),
    ],
)
def test_rotary_positions_that_are_not_computed_here(key, instead, kind, said, tmp_path):
    path = tmp_path / "odd.gguf"
    gguf_twins.write(path, twins.make("llama-linear"), writer_class=partial(SpoilingWriter, key=key, instead=instead))
    assert said in refusal(path, kind).message


def test_frequencies_unlike_llama_3(tmp_path):
    gguf_twins.write(tmp_path / "odd.gguf", twins.make("llama-rope3"))  # its original context is not 8,192
    assert "unlike Llama 3" in refusal(tmp_path / "odd.gguf", Unsupported).message


@pytest.mark.parametrize("name", ["llama-linear", "gemma3", "qwen3_moe", SLOWLY])
def test_spoilt_gguf_metadata(name, tmp_path):
    """Every value of the metadata, in turn, as another number, a word, a list, or not there."""
    twin = twins.make(name)
    gguf_twins.write(tmp_path / "whole.gguf", twin)
    with open_checkpoint(tmp_path / "whole.gguf") as checkpoint:
        keys = [key for key in checkpoint.metadata if not key.startswith("GGUF.")]
    refused = 0
    for key, (i, instead) in itertools.product(keys, enumerate(ODD_METADATA)):
        path = tmp_path / f"{i}.gguf"
        gguf_twins.write(path, twin, writer_class=partial(SpoilingWriter, key=key, instead=instead))
        refused += opens_or_says_why(path)
    assert refused > 50
