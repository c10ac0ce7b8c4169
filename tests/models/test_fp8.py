"""Weights in floats of eight bits, as DeepSeek publishes them: the logits of what torch says they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ondevice.checkpoint import open_checkpoint
from ondevice.errors import BadFile, Unsupported
from ondevice.models.families import family_of
from ondevice.models.parameters import Parameters
from ondevice.schemes import to_float
from ondevice.tensors import Dense
from ondevice.testing.family import check_family
from ondevice.tools.convert import convert, plan, plan_hf
from ondevice.tools.convert.blocks import nearest
from ondevice.tools.quantize import Options, quantize
from tests.models import twins

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
WIDE = {"hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128}
KEPT = ("embed_tokens", "lm_head", "norm", "mlp.gate.")


def publish(twin: Any, folder: Path, block: tuple[int, int], dtype: Any, more: dict | None = None) -> Any:
    """The twin's matrices in FP8 blocks in `folder`; returns a twin of what they stand for."""
    twin.save_pretrained(folder)
    stored, meant = dict(more or {}), {}
    for name, values in safetensors.load_file(folder / "model.safetensors").items():
        meant[name] = stored[name] = values
        if values.ndim == 2 and not any(part in name for part in KEPT):
            stored[name], stored[f"{name}_scale_inv"], meant[name] = in_blocks(values, block, dtype)
    twin = twins.with_tensors(twin, {name: values.numpy() for name, values in meant.items()})
    safetensors.save_file(stored, folder / "model.safetensors", {"format": "pt"})
    rule = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    change(folder, quantization_config=rule)
    return twin


def in_blocks(values: Any, block: tuple[int, int], dtype: Any) -> tuple[Any, Any, Any]:
    """Codes, scales, and the numbers they stand for; the last blocks may be smaller."""
    rows, columns = (-(-n // b) for n, b in zip(values.shape, block, strict=True))
    scales, codes, meant = torch.ones(rows, columns, dtype=dtype), torch.empty_like(values), torch.empty_like(values)
    for r in range(rows):
        for c in range(columns):
            place = slice(r * block[0], (r + 1) * block[0]), slice(c * block[1], (c + 1) * block[1])
            scales[r, c] = values[place].abs().max() / 448
            codes[place] = (values[place] / scales[r, c].float()).clamp(-448, 448).to(torch.float8_e4m3fn).float()
            meant[place] = codes[place] * scales[r, c].float()
    return codes.to(torch.float8_e4m3fn), scales, meant


def change(folder: Path, **fields: Any) -> None:
    place = folder / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | fields))


@pytest.mark.parametrize(
    ("name", "fields", "block", "dtype"),
    [
        ("qwen3", {k: WIDE[k] for k in ("hidden_size", "intermediate_size")}, (128, 128), torch.bfloat16),
        ("deepseek_v3", WIDE, (128, 128), torch.float32),
        ("llama", {}, (16, 12), torch.float32),  # blocks that are not ours: read as float32
    ],
)
def test_logits_are_those_of_what_torch_reads(name, fields, block, dtype, backend, tmp_path):
    check_family(tmp_path, publish(twins.make(name, **fields), tmp_path, block, dtype), backend)


def test_layers_that_guess_ahead_are_left_out_and_named(tmp_path):
    ahead = {f"model.layers.3.{part}.weight": torch.zeros(4) for part in ("enorm", "hnorm", "self_attn.o_proj")}
    twin = publish(twins.make("deepseek_v3", **WIDE), tmp_path, (128, 128), torch.float32, ahead)
    change(tmp_path, num_nextn_predict_layers=0)
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(BadFile, match=r"not used: model\.layers\.3\.enorm"):
        parameters(checkpoint)
    change(tmp_path, num_nextn_predict_layers=1)
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(parameters(checkpoint).apart) == set(ahead)
        (note,) = plan_hf(checkpoint).notes
        assert note == parameters(checkpoint).left_out and "3 tensors (0.0 MB, such as model.layers.3." in note
    check_family(tmp_path, twin)


def parameters(checkpoint: Any) -> Parameters:
    family, hf = family_of(checkpoint)
    return Parameters(family, family.config(hf), checkpoint)


def test_converted_it_is_what_transformers_loads(tmp_path):
    twin = publish(twins.make("deepseek_v3", **WIDE), tmp_path / "fp8", (128, 128), torch.float32)
    with open_checkpoint(tmp_path / "fp8") as checkpoint:
        with pytest.raises(Unsupported, match="FP8"):
            plan(checkpoint)
        convert(plan_hf(checkpoint, "float32"), tmp_path / "dense")
        assert nearest(checkpoint["model.layers.0.mlp.gate_proj.weight"]) == Dense("bfloat16")  # in a GGUF
    read = type(twin).from_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    for name, values in twin.state_dict().items():
        assert torch.equal(values, read.state_dict()[name]), name


def test_quantized_it_counts_as_original(tmp_path):
    publish(twins.make("deepseek_v3", **WIDE), tmp_path / "fp8", (128, 128), torch.float32)
    quantize(tmp_path / "fp8", tmp_path / "out", Options(bits=4, group_size=32, method="rtn"))
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint["model.layers.1.mlp.switch_mlp.up_proj.weight"].format.bits == 4
        assert checkpoint["model.layers.1.self_attn.kv_b_proj.weight"].shape == (96, 14)


def test_one_scale_for_a_whole_matrix(tmp_path):
    codes = torch.randn(6, 128).to(torch.float8_e4m3fn)
    tensors = {"a.weight": codes, "a.weight_scale_inv": torch.tensor(0.3), "b.weight": codes.clone()}
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with open_checkpoint(tmp_path) as checkpoint:
        np.testing.assert_array_equal(to_float(checkpoint["a.weight"]), codes.float().numpy() * np.float32(0.3))
        np.testing.assert_array_equal(to_float(checkpoint["b.weight"]), codes.float().numpy())


RULE = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("scales", "rule", "says"),
    [
        (None, RULE, "without its scales"),
        (torch.ones(2, 2), RULE, "does not fit"),
        (torch.ones(1, 2, dtype=torch.int32), RULE, "are int32"),
        (torch.ones(1, 2), RULE | {"weight_block_size": [128]}, "blocks of"),
        (torch.ones(1, 2), RULE | {"weight_block_size": 128}, "blocks of"),
    ],
)
def test_what_does_not_fit_is_said(scales, rule, says, tmp_path):
    tensors = {"a.weight": torch.zeros(6, 256, dtype=torch.float8_e4m3fn)}
    tensors |= {} if scales is None else {"a.weight_scale_inv": scales}
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": rule}))
    with pytest.raises(BadFile, match=says):
        open_checkpoint(tmp_path)


def test_a_vector_has_no_blocks(tmp_path):
    tensors = {"a.weight": torch.zeros(128, dtype=torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(1)}
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": RULE}))
    with pytest.raises(BadFile, match="does not fit"):
        open_checkpoint(tmp_path)
