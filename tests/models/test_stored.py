"""However weights are stored, in shards, in halves, quantized by MLX or GGUF: the logits of what they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from ondevice.checkpoint import Spec, open_checkpoint, write_folder
from ondevice.checkpoint.write import with_older_keys
from ondevice.schemes import quantize_affine, to_float
from ondevice.tensors import Blocks, dense
from ondevice.testing.family import check_family
from ondevice.tools.convert import convert, plan, plan_hf
from tests.models import gguf_twins, twins

pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "head_dim": 16,
    "num_attention_heads": 4,
    "moe_intermediate_size": 32,
}


def wide(name: str, **fields: Any) -> Any:
    """A twin with rows that can be cut in groups of 32 and 64."""
    own = WIDE if "moe" in name else {k: v for k, v in WIDE.items() if "moe" not in k}
    return twins.make(name, **own, **fields)


def test_shards(backend, twin_folder, tmp_path):
    twin, _ = twin_folder("qwen3_moe")
    twin.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    check_family(tmp_path, twin, backend)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, backend, tmp_path):
    twin = twins.make("gemma3").to(getattr(torch, dtype))
    twin.save_pretrained(tmp_path)
    check_family(tmp_path, type(twin).from_pretrained(tmp_path, dtype=torch.float32), backend)


BITS = {"q_proj": 8, "k_proj": 2, "down_proj": 6, "embed_tokens": 8}  # and 4 for all others: overrides by tensor


@pytest.mark.parametrize("name", ["llama", "llama-biases", "qwen3_moe"])
def test_affine(name, backend, tmp_path):
    """Quantized by us, in MLX's convention, experts one by one; the twin gets what the codes stand for."""
    twin = wide(name)
    held = {n: quantized(n, values) for n, values in twins.saved(twin).items()}
    specs = [Spec(n, t.shape, t.format, lambda t=t: t) for n, t in held.items()]
    write_folder(tmp_path / "quantized", twin.config.to_dict(), specs, {})
    assert open_checkpoint(tmp_path / "quantized").config["quantization"]["bits"] == 4
    dequantized = twins.with_tensors(twin, {n: to_float(t) for n, t in held.items()})
    check_family(tmp_path / "quantized", dequantized, backend)


def quantized(name: str, values: np.ndarray) -> Any:
    bits = next((b for part, b in BITS.items() if part in name), 4)
    return dense(values) if values.ndim == 1 else quantize_affine(values, bits, 32, "float32")


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "qwen3_moe"])
def test_made_by_mlx_lm(name, backend, tmp_path):
    """Loaded, quantized and saved by mlx-lm: experts stacked as switch_mlp, the router in eight bits."""
    mx, utils = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.utils")
    wide(name).save_pretrained(tmp_path / "original")
    place = tmp_path / "original" / "config.json"
    place.write_text(json.dumps(twins.published(json.loads(place.read_text()))))
    model, config = utils.load_model(tmp_path / "original")
    model, config = utils.quantize_model(model, config, group_size=32, bits=4)
    utils.save_model(tmp_path / "quantized", model)
    utils.save_config(config, tmp_path / "quantized" / "config.json")
    stacked = [n for n in open_checkpoint(tmp_path / "quantized").names if "switch_mlp" in n]
    assert bool(stacked) == (name == "qwen3_moe")
    check_family(tmp_path / "quantized", lambda ids: np.array(model(mx.array(ids))), backend)


MEMORY = {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "hidden_size": 64, "head_dim": 16}
SHARED = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}


WITH_MEMORIES = {"qwen3_5": MEMORY | {"intermediate_size": 64}, "qwen3_next": MEMORY | SHARED}


@pytest.mark.parametrize("name", WITH_MEMORIES)
def test_gains_that_mlx_lm_raised(name, tmp_path):
    """Of models with memories mlx-lm saves gains with the one that is added to them, and kernels turned."""
    mx, utils = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.utils")
    twins.make(name, **WITH_MEMORIES[name]).save_pretrained(tmp_path / "original")
    place = tmp_path / "original" / "config.json"
    config = json.loads(place.read_text())
    if name == "qwen3_5":  # the text of a model that also sees
        config = {"model_type": "qwen3_5", "text_config": config}
    place.write_text(json.dumps(with_older_keys(config)))
    model, config = utils.load_model(tmp_path / "original")
    model, config = utils.quantize_model(model, config, group_size=32, bits=8)
    utils.save_model(tmp_path / "quantized", model)
    utils.save_config(config, tmp_path / "quantized" / "config.json")
    check_family(tmp_path / "quantized", lambda ids: np.array(model(mx.array(ids)).astype(mx.float32)))


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_moe"])
def test_gguf_blocks(name, backend, tmp_path):
    """Rows of blocks are permuted and stacked as they are; the twin gets what they stand for."""
    fields = {"query_pre_attn_scalar": 16, "sliding_window_pattern": 6} if name == "gemma3" else {}
    twin, path = wide(name, **fields), tmp_path / "twin.gguf"
    kinds = {"attn_q.weight": "Q8_0", "attn_k.weight": "Q5_1", "token_embd.weight": "Q8_0", "weight": "Q4_1"}
    gguf_twins.write(path, twin, kinds)
    check_family(path, gguf_twins.as_quantized(twin, kinds), backend)


MXFP4 = gguf.GGMLQuantizationType.MXFP4


def in_mxfp4(twin: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """A gpt-oss with the experts that MXFP4 makes of its own, and its tensors as they are published."""
    tensors = twins.saved(twin)
    stored = dict(tensors)
    for name, values in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")) or values.ndim != 3:
            continue
        blocks = gguf.quants.quantize(np.ascontiguousarray(values.swapaxes(1, 2)), MXFP4)
        tensors[name] = np.ascontiguousarray(gguf.quants.dequantize(blocks, MXFP4).swapaxes(1, 2))
        split = blocks.reshape(*blocks.shape[:-1], -1, 17)
        codes = np.concatenate([split[..., 1:] & 15, split[..., 1:] >> 4], axis=-1)  # in their order
        stored[f"{name}_blocks"] = codes[..., ::2] | codes[..., 1::2] << 4
        stored[f"{name}_scales"] = np.ascontiguousarray(split[..., 0])
        del stored[name]
    return twins.with_tensors(twin, tensors), stored


@pytest.fixture
def published(tmp_path) -> tuple[Any, Path]:
    """A tiny gpt-oss as OpenAI published it: experts in codes of four bits."""
    twin, stored = in_mxfp4(twins.make("gpt_oss", hidden_size=64, intermediate_size=64))
    folder = tmp_path / "published"
    twin.save_pretrained(folder)
    save_file(stored, folder / "model.safetensors")
    place = folder / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}))
    return twin, folder


def test_mxfp4(published, backend):
    twin, folder = published
    check_family(folder, twin, backend)


def test_mxfp4_in_a_gguf(published, tmp_path):
    gguf_twins.write(tmp_path / "twin.gguf", published[0], {"exps.weight": "MXFP4"})
    with open_checkpoint(tmp_path / "twin.gguf") as checkpoint:
        assert checkpoint["blk.1.ffn_up_exps.weight"].format == Blocks("MXFP4")
    check_family(tmp_path / "twin.gguf", published[0])


def test_mxfp4_made_by_mlx_lm(published, tmp_path):
    utils = pytest.importorskip("mlx_lm.utils")
    model, config = utils.load_model(published[1])
    utils.save_model(tmp_path / "saved", model)
    utils.save_config(config, tmp_path / "saved" / "config.json")
    check_family(tmp_path / "saved", published[0])


@pytest.mark.parametrize("name", ["gpt2-untied", "granitemoe", "gpt_oss", "phi3"])
def test_converted(name, tmp_path):
    """Read and written again, matrices turned round where the family has them so."""
    twin = twins.make(name)
    twin.save_pretrained(tmp_path / "in")
    with open_checkpoint(tmp_path / "in") as checkpoint:
        convert(plan(checkpoint), tmp_path / "out")
    check_family(tmp_path / "out", twin)


def test_converted_gpt_2_is_read_by_transformers(tmp_path):
    twin = twins.make("gpt2-untied")
    twin.save_pretrained(tmp_path / "in")
    with open_checkpoint(tmp_path / "in") as checkpoint:
        convert(plan_hf(checkpoint), tmp_path / "out")
    check_family(tmp_path / "in", type(twin).from_pretrained(tmp_path / "out").eval())
