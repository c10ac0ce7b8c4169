"""Tiny models of random weights, made by transformers: what each family's decoder is held to.

Three query heads to a key head, heads whose sizes do not add up to the width, windows shorter than the text.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ondevice.testing.family import TINY, randomise

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 40.0,  # of four wavelengths one is kept, one blended, two stretched
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "original_max_position_embeddings": 16,
}
WHOLE_YARN = YARN | {"truncate": False, "rope_theta": 40.0, "original_max_position_embeddings": 64}
BIASED = {"attention_bias": True, "mlp_bias": True}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.3],
    "long_factor": [2.0, 7.5],
}
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
PLAIN = {"hidden_size": 48}  # for classes whose heads share the width: eight again
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.5,
}
GPT2 = {"hidden_size": 48, "max_position_embeddings": 29, "activation_function": "gelu"}
MOE = {"moe_intermediate_size": 12}
PHIMOE = PLAIN | {"num_experts_per_tok": 2, "router_jitter_noise": 0.2}
LLAMA4 = {"num_hidden_layers": 5, "attention_chunk_size": 4, "floor_scale": 3, "attn_scale": 0.7}
SHARP = YARN | {
    "original_max_position_embeddings": 4,
    "llama_4_scaling_beta": 0.3,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
ALPHA = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 50.0, "factor": 1.0}
ERNIE = PLAIN | {"moe_intermediate_size": 12, "moe_k": 3}
GLM = {"moe_intermediate_size": 12, "num_experts_per_tok": 3, "rope_parameters": HALF}
GRANITE4 = {
    "hidden_size": 48,
    "layer_types": ["full_attention"] * 3,
    "num_local_experts": 0,
    "shared_intermediate_size": 28,
    "mamba_n_heads": 12,
    "mamba_d_head": 8,
}
LFM2 = {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8}
DELTA = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 4,
}
NEXT = {"num_experts": 5, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 20}
SHARED = {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 20, "hidden_size": 48}
LATENT = {
    "num_key_value_heads": 6,
    "head_dim": 4,
    "kv_lora_rank": 14,
    "q_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 10,
    "moe_intermediate_size": 12,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 0,
}
TWINS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> transformers' prefix, what differs from TINY
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-rope3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}}),
    "llama-odd": ("Llama", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6, "hidden_act": "gelu"}),
    "llama-defaults": ("Llama", {"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-2}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "qwen3-biases": ("Qwen3", {"attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3-window": ("Qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "gemma3": ("Gemma3", {"sliding_window": 5, "sliding_window_pattern": 2, "query_pre_attn_scalar": 24}),
    "gemma3-full": (
        "Gemma3",
        {
            "num_hidden_layers": 7,  # one more than the usual pattern of six
            "sliding_window": 3,
            "final_logit_softcapping": 2.5,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 300000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mistral-full": ("Mistral", {"sliding_window": None, "head_dim": None, "rope_parameters": YARN}),
    "mistral-some": ("Ministral", {"sliding_window": 4, "layer_types": ["full_attention"] + 2 * ["sliding_attention"]}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}),
    "qwen2-dynamic": ("Qwen2", {"max_position_embeddings": 10, "rope_parameters": DYNAMIC}),
    "phi3": ("Phi3", {"sliding_window": 6, **PLAIN}),
    "phi3-long": ("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 8, **PLAIN}),
    "phi3-short": ("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32, **PLAIN}),
    "gemma": ("Gemma", {"num_key_value_heads": 1}),
    "gemma-gelu": ("Gemma", {"hidden_act": "gelu", "tie_word_embeddings": False}),
    "gemma2": (
        "Gemma2",
        {
            "sliding_window": 4,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma2-uncapped": ("Gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5, "num_key_value_heads": 3}),
    "smollm3-window": ("SmolLM3", {"no_rope_layers": [0, 1, 0], "use_sliding_window": True, "sliding_window": 4}),
    "olmo2": ("Olmo2", {}),
    "olmo2-third": (
        "Olmo3",
        {
            "num_hidden_layers": 5,
            "sliding_window": 4,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "granite": ("Granite", {**GRANITE, "tie_word_embeddings": True}),
    "granite-biases": ("Granite", {**GRANITE, "attention_bias": True, "mlp_bias": True}),
    "stablelm": ("StableLm", PLAIN | {"use_qkv_bias": True}),
    "stablelm-parallel": (
        "StableLm",
        PLAIN
        | {
            "use_parallel_residual": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        },
    ),
    "stablelm-norms": ("StableLm", PLAIN | {"qk_layernorm": True, "use_parallel_residual": True}),
    "starcoder2": ("Starcoder2", {"sliding_window": 5}),
    "starcoder2-bare": ("Starcoder2", {"use_bias": False, "tie_word_embeddings": False, "hidden_act": "gelu"}),
    "gpt_neox": ("GPTNeoX", PLAIN),
    "gpt_neox-serial": (
        "GPTNeoX",
        PLAIN
        | {
            "use_parallel_residual": False,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "rope_parameters": HALF,
        },
    ),
    "cohere": ("Cohere", {"logit_scale": 0.5}),
    "cohere-biases": ("Cohere", {"attention_bias": True, "tie_word_embeddings": False}),
    "cohere-norms": ("Cohere", {"use_qk_norm": True}),
    "cohere2": ("Cohere2", PLAIN | {"num_hidden_layers": 5, "sliding_window": 4, "logit_scale": 0.25}),
    "glm4": ("Glm4", {"rope_parameters": HALF}),
    "glm4-first": ("Glm", {"attention_bias": False, "rope_parameters": HALF}),
    "gpt2": ("GPT2", GPT2),
    "gpt2-untied": ("GPT2", GPT2 | {"n_inner": 40, "tie_word_embeddings": False, "scale_attn_weights": False}),
    "lfm2": ("Lfm2", LFM2),
    "lfm2-biases": ("Lfm2", LFM2 | {"conv_bias": True, "conv_L_cache": 4, "tie_word_embeddings": False}),
    "qwen3_5": ("Qwen3_5", DELTA),
    "qwen3_5-wide": (
        "Qwen3_5",
        DELTA
        | {
            "num_hidden_layers": 2,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
            "full_attention_interval": 2,
        },
    ),
    "lfm2_moe": (
        "Lfm2Moe",
        LFM2 | MOE | {"num_dense_layers": 1, "num_experts": 5, "num_experts_per_tok": 2, "routed_scaling_factor": 1.5},
    ),
    "qwen3_next": ("Qwen3Next", DELTA | MOE | NEXT),
    "qwen3_next-some": (
        "Qwen3Next",
        DELTA
        | MOE
        | NEXT
        | {"linear_num_key_heads": 3, "mlp_only_layers": [1], "norm_topk_prob": False, "tie_word_embeddings": True},
    ),
    "qwen3_5_moe": (
        "Qwen3_5Moe",
        DELTA | MOE | {"num_experts": 5, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 20},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral-window": ("Mixtral", {"num_local_experts": 30, "num_experts_per_tok": 3, "sliding_window": 4}),
    "phimoe": ("Phimoe", PHIMOE | {"num_local_experts": 5}),
    "phimoe-long": (
        "Phimoe",
        PHIMOE
        | {
            "num_local_experts": 30,
            "attention_bias": True,
            "lm_head_bias": True,
            "sliding_window": 5,
            "rope_parameters": {key: value for key, value in LONGROPE.items() if key != "partial_rotary_factor"}
            | {
                "short_factor": [1.0, 1.3, 1.5, 2.0],
                "long_factor": [2.0, 7.5, 8.0, 9.0],
                "short_mscale": 1.3,
                "long_mscale": 1.6,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "llama4": (
        "Llama4",
        LLAMA4 | {"num_local_experts": 5, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 28},
    ),
    "llama4-experts": (
        "Llama4",
        LLAMA4 | {"num_local_experts": 30, "num_experts_per_tok": 3, "no_rope_layers": [0, 1, 1, 0, 1]},
    ),
    "llama4-plain": (
        "Llama4",
        LLAMA4
        | {
            "num_local_experts": 4,
            "moe_layers": [1],
            "use_qk_norm": False,
            "attn_temperature_tuning": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "ministral3": ("Ministral3", {"sliding_window": None, "rope_parameters": SHARP}),
    "ministral3-window": (
        "Ministral3",
        {"sliding_window": 5, "tie_word_embeddings": True, "rope_parameters": SHARP | {"llama_4_scaling_beta": 0.7}},
    ),
    "arcee": ("Arcee", {}),
    "arcee-biases": ("Arcee", {"mlp_bias": True, "attention_bias": True, "rope_parameters": YARN}),
    "internlm3": ("InternLM3", {"tie_word_embeddings": True}),
    "internlm3-biases": ("InternLM3", BIASED | {"rope_parameters": DYNAMIC, "num_key_value_heads": 3}),
    "nemotron": ("Nemotron", {"rope_parameters": HALF}),
    "nemotron-biases": (
        "Nemotron",
        BIASED | {"tie_word_embeddings": True, "rope_parameters": HALF | {"rope_theta": 5e2}},
    ),
    "olmo": ("Olmo", PLAIN),
    "olmo-tied": ("Olmo", PLAIN | {"tie_word_embeddings": True, "attention_bias": True}),
    "seed_oss": ("SeedOss", {}),
    "seed_oss-bare": ("SeedOss", {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}),
    "hunyuan": ("HunYuanDenseV1", {"rope_parameters": ALPHA, "tie_word_embeddings": True}),
    "hunyuan-plain": ("HunYuanDenseV1", {"attention_bias": True, "head_dim": 6}),
    "exaone4": ("Exaone4", {"num_hidden_layers": 5, "sliding_window": 4, "rope_parameters": LLAMA3}),
    "exaone4-full": ("Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "ernie4_5": ("Ernie4_5", {}),
    "ernie4_5-biases": ("Ernie4_5", {"use_bias": True, "tie_word_embeddings": False}),
    "ernie4_5_moe": ("Ernie4_5_Moe", ERNIE | {"moe_num_experts": 5}),
    "ernie4_5_moe-some": (
        "Ernie4_5_Moe",
        ERNIE
        | {
            "moe_num_experts": 30,
            "moe_num_shared_experts": 0,
            "moe_layer_interval": 2,
            "num_hidden_layers": 6,
            "moe_layer_end_index": 4,
            "use_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "glm4_moe": ("Glm4Moe", GLM | {"n_routed_experts": 6, "use_qk_norm": True, "routed_scaling_factor": 1.5}),
    "glm4_moe-groups": (
        "Glm4Moe",
        GLM | {"n_routed_experts": 24, "n_group": 4, "topk_group": 2, "attention_bias": True, "norm_topk_prob": False},
    ),
    "granite4": ("GraniteMoeHybrid", GRANITE | GRANITE4 | {"position_embedding_type": "rope"}),
    "granite4-still": ("GraniteMoeHybrid", GRANITE | GRANITE4 | {"attention_bias": True, "tie_word_embeddings": True}),
    "phi": ("Phi", PLAIN),
    "phi-whole": ("Phi", PLAIN | {"rope_parameters": HALF | {"partial_rotary_factor": 1.0}, "hidden_act": "gelu"}),
    "helium": ("Helium", PLAIN),
    "helium-biases": ("Helium", PLAIN | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen2_moe": ("Qwen2Moe", SHARED | {"num_experts": 5, "num_experts_per_tok": 2}),
    "qwen2_moe-some": (
        "Qwen2Moe",
        SHARED
        | {
            "num_experts": 4,
            "num_experts_per_tok": 4,
            "qkv_bias": False,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "olmoe": ("Olmoe", PLAIN | {"num_experts": 7, "num_experts_per_tok": 3}),
    "olmoe-sums": ("Olmoe", PLAIN | {"num_experts": 30, "num_experts_per_tok": 2, "norm_topk_prob": True}),
    "granitemoe": ("GraniteMoe", GRANITE | PLAIN | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "granitemoe-shared": (
        "GraniteMoeShared",
        GRANITE | PLAIN | {"num_local_experts": 5, "num_experts_per_tok": 2, "shared_intermediate_size": 20},
    ),
    "gpt_oss": ("GptOss", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 4}),
    "gpt_oss-yarn": (
        "GptOss",
        {
            "num_local_experts": 30,
            "num_experts_per_tok": 4,
            "sliding_window": 4,
            "rope_parameters": WHOLE_YARN,
        },
    ),
    "deepseek_v2": ("DeepseekV2", LATENT | {"q_lora_rank": None, "n_routed_experts": 5, "first_k_dense_replace": 1}),
    "deepseek_v2-yarn": (
        "DeepseekV2",
        LATENT
        | {
            "n_routed_experts": 30,
            "routed_scaling_factor": 1.5,
            "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.9},
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        LATENT | {"n_routed_experts": 12, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1},
    ),
    "deepseek_v3-plain": (
        "DeepseekV3",
        LATENT
        | {"n_routed_experts": 6, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "rope_interleave": False},
    ),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True}),
    "qwen3_moe-sums": ("Qwen3Moe", {"num_experts": 40, "num_experts_per_tok": 3, "norm_topk_prob": False}),
    "qwen3_moe-some": (
        "Qwen3Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 6,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
        },
    ),
}
HEADS = {"GPT2": "LMHeadModel"}
CLASSES = {"InternLM3": "Llama"}  # whose model is another's
BACKENDS = ("reference", "cpu", "cuda", "mlx")
PAIRS = [  # one of a family on those that are slow on a CPU; the others when there is time
    pytest.param(b, name, marks=[pytest.mark.slow] if "-" in name and b in ("cuda", "mlx") else [])
    for b in BACKENDS
    for name in TWINS
]


def make(name: str, **fields: Any) -> Any:
    """The twin called `name`, with `fields` of its config changed."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    pytest.importorskip("torch").manual_seed(0)  # some begin with parameters drawn by chance
    kind, own = TWINS[name]
    config_class = getattr(
        transformers,
        {k: f"{k}TextConfig" for k in ("Gemma3", "Llama4", "Qwen3_5", "Qwen3_5Moe")}.get(kind, f"{kind}Config"),
    )
    sizes = deepcopy(TINY | {"pad_token_id": 0} | (MOE if kind == "Qwen3Moe" else {}) | own | fields)
    model = f"{CLASSES.get(kind, kind)}{HEADS.get(kind, 'ForCausalLM')}"
    return randomise(getattr(transformers, model)(config_class(**sizes)))


def saved(twin: Any) -> dict[str, np.ndarray]:
    """The tensors as save_pretrained names them, layers and experts in their order."""
    with TemporaryDirectory() as folder:
        twin.save_pretrained(folder)
        tensors = load_file(Path(folder) / "model.safetensors")
    return dict(sorted(tensors.items(), key=lambda item: [int(p) if p.isdigit() else p for p in item[0].split(".")]))


def with_tensors(twin: Any, tensors: dict[str, np.ndarray]) -> Any:
    """A copy of the twin with other weights, named as `saved` does."""
    with TemporaryDirectory() as folder:
        twin.save_pretrained(folder)
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        return type(twin).from_pretrained(folder).eval()


def published(hf: dict[str, Any]) -> dict[str, Any]:
    """A config.json as models published before transformers 5 have it."""
    if "rope_parameters" not in hf or hf["model_type"] == "ministral3":  # which was published in no other form
        return hf
    rule = hf.pop("rope_parameters")
    if hf["model_type"] not in (
        "ministral",
        "lfm2",
        "lfm2_moe",
        "qwen3_5_text",
        "qwen3_5_moe_text",
        "qwen3_next",
        "granitemoehybrid",
    ):  # which have been published in no other form
        hf.pop("layer_types", None)
    full = dict(rule.get("full_attention", rule))
    hf["rope_theta"] = full.pop("rope_theta")
    if "partial_rotary_factor" in full:
        hf["partial_rotary_factor"] = full.pop("partial_rotary_factor")
    hf["rope_scaling"] = None if full["rope_type"] == "default" else full
    if hf["rope_scaling"] == {"rope_type": "linear", "factor": 2.5}:
        hf["rope_scaling"] = {"type": "linear", "factor": 2.5}  # older still
    if hf["model_type"] == "gemma3_text":
        hf["rope_local_base_freq"] = rule["sliding_attention"]["rope_theta"]
        hf["sliding_window_pattern"] = hf.pop("_sliding_window_pattern")
        for usual in ("hidden_activation", "tie_word_embeddings", "attention_bias", "rms_norm_eps"):
            del hf[usual]
    if hf["model_type"] == "qwen3_moe":
        hf["num_experts"] = hf.pop("num_local_experts")
    if hf.get("use_sliding_window") is False and hf["model_type"].startswith("qwen3"):
        hf["sliding_window"] = 4  # published configs have one, switched off
    if hf["model_type"] == "gpt_neox":
        hf["rotary_pct"], hf["rotary_emb_base"] = hf.pop("partial_rotary_factor"), hf.pop("rope_theta")
    if hf["model_type"] == "phi3" and hf["rope_scaling"]:
        hf["rope_scaling"]["type"] = {"longrope": "su"}[hf["rope_scaling"].pop("rope_type")]
    return hf
