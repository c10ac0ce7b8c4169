"""Tiny models of random weights, made by transformers: what each family's decoder is held to.

Three query heads to a key head, heads whose sizes do not add up to the width, windows shorter than the text.
"""

from __future__ import annotations

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
MOE = {"moe_intermediate_size": 12}
BACKENDS = ("reference", "cpu", "cuda", "mlx")
PAIRS = [(b, name) for b in BACKENDS for name in TWINS if b != "mlx" or "-" not in name]  # MLX is slow on a CPU


def make(name: str, **fields: Any) -> Any:
    """The twin called `name`, with `fields` of its config changed."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    kind, own = TWINS[name]
    config_class = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(kind, f"{kind}Config"))
    sizes = TINY | (MOE if kind == "Qwen3Moe" else {}) | own | fields
    return randomise(getattr(transformers, f"{kind}ForCausalLM")(config_class(**sizes)))


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
    rule = hf.pop("rope_parameters")
    hf.pop("layer_types", None)
    full = dict(rule.get("full_attention", rule))
    hf["rope_theta"] = full.pop("rope_theta")
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
    if hf["model_type"].startswith("qwen3") and not hf["use_sliding_window"]:
        hf["sliding_window"] = 4  # published configs have one, switched off
    return hf
