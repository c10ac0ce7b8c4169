"""A twin as llama.cpp's converter writes it: other names and metadata, q and k rearranged for Llama, gains plus one for
Gemma, experts stacked. Written by the `gguf` package, whose maps know the names."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.models import twins

ARCHITECTURES = {  # model type -> llama.cpp's name, where they differ
    "gemma3_text": "gemma3", "qwen3_moe": "qwen3moe", "qwen2_moe": "qwen2moe", "mixtral": "llama", "mistral": "llama",
    "gpt_neox": "gptneox", "cohere": "command-r", "olmo3": "olmo2", "granitemoeshared": "granitemoe",
    "gpt_oss": "gpt-oss", "llama4_text": "llama4", "hunyuan_v1_dense": "hunyuan-dense", "ministral3": "mistral3",
    "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2", "phi": "phi2", "glm4_moe": "glm4moe",
    "ernie4_5_moe": "ernie4_5-moe", "lfm2_moe": "lfm2moe", "qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe",
    "qwen3_next": "qwen3next",
}  # fmt: skip
PERMUTED = ("llama", "olmo", "arcee", "mistral3", "smollm3", "granite", "granitemoe")  # q and k as Llama's
GRANITE = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
DELTA = {
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
}
KEYS = {  # architecture -> its own metadata: an attribute of the config -> the key
    "command-r": {"logit_scale": "logit_scale"},
    "cohere2": {"logit_scale": "logit_scale", "sliding_window": "attention.sliding_window"},
    "gemma2": {
        "sliding_window": "attention.sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    "deepseek2": {
        "q_lora_rank": "attention.q_lora_rank",
        "kv_lora_rank": "attention.kv_lora_rank",
        "qk_head_dim": "attention.key_length_mla",
        "v_head_dim": "attention.value_length_mla",
        "first_k_dense_replace": "leading_dense_block_count",
        "n_shared_experts": "expert_shared_count",
        "routed_scaling_factor": "expert_weights_scale",
        "norm_topk_prob": "expert_weights_norm",
        "n_group": "expert_group_count",
        "topk_group": "expert_group_used_count",
    },
    "ernie4_5-moe": {
        "moe_num_experts": "expert_count",
        "moe_k": "expert_used_count",
        "moe_num_shared_experts": "expert_shared_count",
        "moe_layer_start_index": "leading_dense_block_count",
        "moe_layer_interval": "interleave_moe_layer_step",
    },
    "exaone4": {"sliding_window": "attention.sliding_window"},
    "gemma3": {"sliding_window": "attention.sliding_window"},
    "glm4moe": {
        "first_k_dense_replace": "leading_dense_block_count",
        "n_shared_experts": "expert_shared_count",
        "routed_scaling_factor": "expert_weights_scale",
        "norm_topk_prob": "expert_weights_norm",
    },
    "gptneox": {"use_parallel_residual": "use_parallel_residual"},
    "granite": GRANITE,
    "granitemoe": GRANITE | {"shared_intermediate_size": "expert_shared_feed_forward_length"},
    "llama4": {
        "intermediate_size": "expert_feed_forward_length",
        "intermediate_size_mlp": "feed_forward_length",
        "interleave_moe_layer_step": "interleave_moe_layer_step",
    },
    "mistral3": {"sliding_window": "attention.sliding_window"},
    "lfm2": {"conv_L_cache": "shortconv.l_cache"},
    "lfm2moe": {"conv_L_cache": "shortconv.l_cache", "num_dense_layers": "leading_dense_block_count"},
    "olmo2": {"sliding_window": "attention.sliding_window"},
    "phi3": {"sliding_window": "attention.sliding_window"},
    "gpt-oss": {"sliding_window": "attention.sliding_window", "intermediate_size": "expert_feed_forward_length"},
    "qwen3next": DELTA | {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"},
    "qwen35": DELTA,
    "qwen35moe": DELTA | {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"},
    "qwen2moe": {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"},
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
    tensors = twins.saved(twin)
    for name, values in tensors.items():
        kind = _kind(_rename(re.sub(r"experts\.\d+", "experts", name), _architecture(twin)), values, kinds)
        if kind is not None:
            tensors[name] = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
    return twins.with_tensors(twin, tensors)


def _architecture(twin: Any) -> str:
    kind = twin.config.model_type
    return ARCHITECTURES.get(kind, kind)


def _kind(name: str, values: np.ndarray, kinds: dict[str, str]) -> gguf.GGMLQuantizationType | None:
    kind = next((k for end, k in kinds.items() if name.endswith(end)), None)
    return None if kind is None or values.ndim == 1 else gguf.GGMLQuantizationType[kind]


def _metadata(writer: gguf.GGUFWriter, config: Any, architecture: str) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    inner = getattr(config, "n_inner", None) or 4 * config.hidden_size
    if architecture == "lfm2":
        inner = config.block_multiple_of * -(-(2 * config.intermediate_size // 3) // config.block_multiple_of)
    writer.add_feed_forward_length(inner if architecture in ("gpt2", "lfm2") else config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type in ("deepseek_v3", "glm4_moe", "lfm2_moe"):
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if architecture == "deepseek2":
        writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    elif architecture not in ("gpt2", "gptneox"):
        kinds = getattr(config, "layer_types", None) or []
        attends = [config.num_key_value_heads * (kind != "conv") for kind in kinds]
        writer.add_head_count_kv(attends if "conv" in kinds else config.num_key_value_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_context_length(config.max_position_embeddings)
    if eps := getattr(config, "rms_norm_eps", None) or getattr(config, "norm_eps", None):
        writer.add_layer_norm_rms_eps(eps)
    for name in ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"):
        if eps := getattr(config, name, None):
            writer.add_layer_norm_eps(eps)
    writer.add_vocab_size(config.vocab_size)
    if architecture != "gpt2":
        _rope(writer, config, head_dim)
    for name, key in KEYS.get(architecture, {}).items():
        if (value := getattr(config, name, None)) is not None:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}[type(value)]
            add(f"{architecture}.{key}", value)
    if architecture.startswith(("qwen35", "qwen3next")):
        writer.add_ssm_inner_size(config.linear_num_value_heads * config.linear_value_head_dim)
        writer.add_full_attention_interval(config.layer_types.index("full_attention") + 1)
    if hasattr(config, "num_experts_per_tok"):
        writer.add_expert_count(getattr(config, "num_experts", None) or config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _rope(writer: gguf.GGUFWriter, config: Any, head_dim: int) -> None:
    rule = config.rope_parameters
    rule = rule.get("full_attention", rule)
    writer.add_rope_dimension_count(int(head_dim * rule.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rule["rope_theta"])
    if rule["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rule["rope_type"]))
        writer.add_rope_scaling_factor(rule["factor"])
    if "mscale_all_dim" in rule:
        unit = 1.0 if config.model_type == "ministral3" else 0.1
        writer.add_rope_scaling_yarn_log_mul(unit * rule["mscale_all_dim"])
    if "llama_4_scaling_beta" in rule:
        writer.add_attn_temperature_scale(rule["llama_4_scaling_beta"])
    if "beta_fast" in rule:
        writer.add_rope_scaling_yarn_beta_fast(rule["beta_fast"])
    if rule["rope_type"] in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rule["original_max_position_embeddings"])


def _tensors(twin: Any, architecture: str) -> dict[str, np.ndarray]:
    config, experts, found = twin.config, {}, {}
    tied = {"lm_head.weight", "embed_out.weight"} if config.tie_word_embeddings else set()
    for name, values in twins.saved(twin).items():
        if name in tied:
            continue
        one = re.search(r"(experts|\.norms)\.\d+\.", name)  # of several experts, of the norms of several heads
        if one:
            together = name.replace(one[0], "experts." if "experts" in one[0] else ".")
            experts.setdefault(_rename(together, architecture), []).append(values)
        elif "kv_b_proj" in name:
            by_head = values.reshape(config.num_attention_heads, -1, values.shape[-1])
            k, v = np.split(by_head, [config.qk_nope_head_dim], axis=1)
            found[_rename(name.replace("kv_b", "k_b"), architecture)] = np.ascontiguousarray(k.swapaxes(1, 2))
            found[_rename(name.replace("kv_b", "v_b"), architecture)] = np.ascontiguousarray(v)
        elif "in_proj_qkvz" in name:
            found |= _by_kind(name, values, config)
        elif ".experts." in name and architecture in ("gpt-oss", "llama4"):
            found |= _fused_experts(name, values, architecture == "gpt-oss")
        elif "input_linear" in name:
            gate, up = np.split(values, 2, axis=-2)
            module = name.replace("block_sparse_moe.input_linear", "mlp.experts.{}_proj")
            module = module.replace("shared_mlp.input_linear", "mlp.shared_expert.{}_proj")
            found[_rename(module.format("gate"), "qwen2moe")] = gate
            found[_rename(module.format("up"), "qwen2moe")] = up
        else:
            renamed = _rename(name, architecture) + (".weight" if name.endswith("sinks") else "")
            found[renamed] = _arranged(name, values, config, architecture)
    found |= {name: np.stack(values) for name, values in experts.items()}
    return found | _factors(config, architecture)


def _by_kind(name: str, values: np.ndarray, config: Any) -> dict[str, np.ndarray]:
    """Queries, keys, values and gates of each key head -> all queries, keys and values; all gates."""
    each = config.linear_num_value_heads // config.linear_num_key_heads * config.linear_value_head_dim
    sizes = np.cumsum([config.linear_key_head_dim, config.linear_key_head_dim, each])
    parts = np.split(values.reshape(config.linear_num_key_heads, -1, values.shape[-1]), sizes, axis=1)
    *qkv, gates = (part.reshape(-1, values.shape[-1]) for part in parts)
    blk = f"blk.{name.split('.')[2]}"
    return {f"{blk}.attn_qkv.weight": np.concatenate(qkv), f"{blk}.attn_gate.weight": gates}


def _value_heads_in_turn(values: np.ndarray, config: Any, axis: int, before: int) -> np.ndarray:
    """Those of one key head together -> one of each key head in turn, behind the first rows, which stay."""
    first, rest = np.split(values, [before], axis)
    shape = rest.shape
    split = (config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads)
    rest = rest.reshape(*shape[:axis], *split, -1, *shape[axis + 1 :]).swapaxes(axis, axis + 1)
    return np.concatenate([first, rest.reshape(shape)], axis)


def _delta(name: str, values: np.ndarray, config: Any, architecture: str) -> np.ndarray:
    values = -np.exp(values) if name.endswith("A_log") else values
    values = values.squeeze(1) if "conv1d" in name else values
    if architecture == "qwen3next" or name.endswith("linear_attn.norm.weight"):
        return values
    keys = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    before = keys if "qkv" in name or "conv1d" in name else 0
    return _value_heads_in_turn(values, config, 1 if "out_proj" in name else 0, before)


def _fused_experts(name: str, values: np.ndarray, in_turn: bool) -> dict[str, np.ndarray]:
    """gpt-oss's: gate and up in turn, matrices transposed, biases beside them; and Llama 4's, one behind the other."""
    module, _, part = name.rpartition(".")
    bias = part.endswith("_bias")
    values = values if bias else np.ascontiguousarray(values.swapaxes(-1, -2))
    parts = {"down": values}
    if part.startswith("gate_up"):
        halves = (values[:, ::2], values[:, 1::2]) if in_turn else np.split(values, 2, axis=1)
        parts = dict(zip(("gate", "up"), halves, strict=True))
    suffix = "bias" if bias else "weight"
    return {_rename(f"{module}.{kind}_proj.{suffix}", "qwen2moe"): np.ascontiguousarray(v) for kind, v in parts.items()}


def _arranged(name: str, values: np.ndarray, config: Any, architecture: str) -> np.ndarray:
    """As the converter turns tensors round."""
    if architecture in PERMUTED and re.search(r"[qk]_proj", name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    if "linear_attn" in name:
        return _delta(name, values, config, architecture)
    if architecture.startswith(("gemma", "nemotron", "qwen35", "qwen3next")) and name.endswith("norm.weight"):
        return values + 1
    if re.search(r"\.c_(attn|proj|fc)\.weight", name) and architecture == "gpt2":
        return np.ascontiguousarray(values.T)
    if "query_key_value" in name:
        return values.reshape(config.num_attention_heads, 3, -1, *values.shape[1:]).swapaxes(0, 1).reshape(values.shape)
    return values[0] if name.endswith("shared_expert_gate.weight") else values.squeeze()  # a convolution's kernels


def _factors(config: Any, architecture: str) -> dict[str, np.ndarray]:
    rule = getattr(config, "rope_parameters", None) or {}
    if architecture in ("llama", "exaone4") and rule["rope_type"] == "llama3":
        return {"rope_freqs.weight": _divisors(rule, config.head_dim)}
    if rule.get("rope_type") == "longrope":
        return {f"rope_factors_{k}.weight": np.array(rule[f"{k}_factor"], np.float32) for k in ("long", "short")}
    return {}


@cache
def _map(architecture: str) -> gguf.TensorNameMap:
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(kinds[architecture], 10)


def _rename(name: str, architecture: str) -> str:
    name = name.replace("dt_bias", "dt_proj.bias")
    name = name.replace("e_score_correction_bias", "e_score_correction.bias").replace("expert_bias", "expert_bias.bias")
    for part, usual in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        name = name.replace(f"feed_forward.experts.{part}", f"mlp.experts.{usual}")
    return _map(architecture).get_name(name, try_suffixes=(".weight", ".bias"))


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
