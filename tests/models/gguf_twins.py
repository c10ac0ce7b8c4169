"""A twin as llama.cpp's converter writes it: other names and metadata, q and k rearranged for Llama, gains plus one for
Gemma, experts stacked. Written by the `gguf` package."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import twins

MODEL_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
BLOCK_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp", "mlp.experts.gate_proj": "ffn_gate_exps", "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}  # fmt: skip
GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def write(
    path: Path,
    twin: Any,
    kinds: dict[str, str] | None = None,
    writer_class: Callable[[Path, str], gguf.GGUFWriter] = gguf.GGUFWriter,
) -> None:
    """kinds: the end of a tensor's name -> the block type that it is quantized to; float32 where none fits."""
    architecture = _architecture(twin)
    writer = writer_class(path, architecture)
    _metadata(writer, twin.config, architecture)
    for name, values in _tensors(twin, architecture).items():
        kind = _kind(name, values, kinds or {})
        writer.add_tensor(name, values if kind is None else gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_quantized(twin: Any, kinds: dict[str, str]) -> Any:
    """The twin with the weights that the blocks `write` makes stand for: a block never leaves its row."""
    names, tensors = _names(_architecture(twin)), twins.saved(twin)
    for name, values in tensors.items():
        kind = _kind(_rename(re.sub(r"experts\.\d+", "experts", name), names), values, kinds)
        if kind is not None:
            tensors[name] = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
    return twins.with_tensors(twin, tensors)


def _architecture(twin: Any) -> str:
    kind = twin.config.model_type
    return {"gemma3_text": "gemma3", "qwen3_moe": "qwen3moe"}.get(kind, kind)


def _names(architecture: str) -> dict[str, str]:
    return BLOCK_NAMES | (GEMMA_NAMES if architecture == "gemma3" else {})


def _kind(name: str, values: np.ndarray, kinds: dict[str, str]) -> gguf.GGMLQuantizationType | None:
    kind = next((k for end, k in kinds.items() if name.endswith(end)), None)
    return None if kind is None or values.ndim == 1 else gguf.GGMLQuantizationType[kind]


def _metadata(writer: gguf.GGUFWriter, config: Any, architecture: str) -> None:
    head_dim = config.head_dim
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rule = config.rope_parameters
    rule = rule.get("full_attention", rule)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rule["rope_theta"])
    if rule["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rule["factor"])
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    if architecture == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _tensors(twin: Any, architecture: str) -> dict[str, np.ndarray]:
    config, experts, found = twin.config, {}, {}
    names = _names(architecture)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name, values in twins.saved(twin).items():
        if name in tied:
            continue
        if architecture == "llama" and re.search(r"[qk]_proj", name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if architecture == "gemma3" and "norm" in name:
            values = values + 1
        expert = re.search(r"experts\.(\d+)\.", name)
        if expert:
            experts.setdefault(_rename(name.replace(expert[0], "experts."), names), []).append(values)
        else:
            found[_rename(name, names)] = values
    found |= {name: np.stack(values) for name, values in experts.items()}
    if architecture == "llama" and config.rope_parameters["rope_type"] == "llama3":
        found["rope_freqs.weight"] = _divisors(config.rope_parameters, config.head_dim)
    return found


def _rename(name: str, names: dict[str, str]) -> str:
    module, _, part = name.rpartition(".")
    layer = re.match(r"model\.layers\.(\d+)\.(.*)", module)
    return f"blk.{layer[1]}.{names[layer[2]]}.{part}" if layer else f"{MODEL_NAMES[module]}.{part}"


def _divisors(rule: dict[str, Any], head_dim: int) -> np.ndarray:
    """What the converter stores of Llama 3's rope: by how much each frequency is divided."""
    old, low, high = (rule[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * rule["rope_theta"] ** (i / head_dim)
        if wavelength < old / high:
            divisors.append(1.0)
        elif wavelength > old / low:
            divisors.append(rule["factor"])
        else:
            smooth = (old / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / rule["factor"] + smooth))
    return np.array(divisors, np.float32)
