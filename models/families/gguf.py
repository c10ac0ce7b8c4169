"""What llama.cpp's architectures share: tensor names, metadata keys, the order of rotary pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ...errors import BadFile
from ...schemes import take_rows
from ...tensors import Tensor, dense, floats
from ..config import ModelConfig
from . import NameMap

if TYPE_CHECKING:
    from ...checkpoint import Checkpoint

NAMES = NameMap(
    {
        "embed": "token_embd.weight",
        "norm": "output_norm.weight",
        "head": "output.weight",
        "layers.{i}.attn_norm": "blk.{i}.attn_norm.weight",
        "layers.{i}.mlp_norm": "blk.{i}.ffn_norm.weight",
        "layers.{i}.attn.q": "blk.{i}.attn_q.weight",
        "layers.{i}.attn.k": "blk.{i}.attn_k.weight",
        "layers.{i}.attn.v": "blk.{i}.attn_v.weight",
        "layers.{i}.attn.o": "blk.{i}.attn_output.weight",
        "layers.{i}.attn.q_norm": "blk.{i}.attn_q_norm.weight",
        "layers.{i}.attn.k_norm": "blk.{i}.attn_k_norm.weight",
        "layers.{i}.mlp.gate": "blk.{i}.ffn_gate.weight",
        "layers.{i}.mlp.up": "blk.{i}.ffn_up.weight",
        "layers.{i}.mlp.down": "blk.{i}.ffn_down.weight",
        "layers.{i}.moe.router": "blk.{i}.ffn_gate_inp.weight",
        "layers.{i}.moe.gate": "blk.{i}.ffn_gate_exps.weight",
        "layers.{i}.moe.up": "blk.{i}.ffn_up_exps.weight",
        "layers.{i}.moe.down": "blk.{i}.ffn_down_exps.weight",
    }
)

KEYS = {  # Hugging Face's name -> (key behind the architecture's name)
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}


def config(metadata: Mapping, checkpoint: Checkpoint, model_type: str, architecture_class: str, **more) -> dict:
    """The metadata as a config.json of this model type; `more` is what the family adds or overrides."""
    prefix = metadata["general.architecture"]
    found = {hf: metadata.get(f"{prefix}.{key}") for hf, key in KEYS.items()}
    hf = {key: _number(value) for key, value in found.items() if value is not None}
    if "token_embd.weight" not in checkpoint:
        raise BadFile(
            f"{checkpoint.path} has no token_embd.weight.", "It may be one part of a split GGUF; fetch the whole."
        )
    hf["vocab_size"] = checkpoint["token_embd.weight"].shape[0]
    hf["tie_word_embeddings"] = "output.weight" not in checkpoint
    if metadata.get(f"{prefix}.rope.scaling.type") == "linear":
        hf["rope_scaling"] = {"rope_type": "linear", "factor": float(metadata[f"{prefix}.rope.scaling.factor"])}
    for ours in ("bos", "eos"):
        token = metadata.get(f"tokenizer.ggml.{ours}_token_id")
        if token is not None:
            hf[f"{ours}_token_id"] = int(token)
    return {"architectures": [architecture_class], "model_type": model_type} | hf | more


def _number(value):
    """Plain Python numbers, so that the result can be written as JSON."""
    return value.item() if isinstance(value, np.generic) else value


def unpermute(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Llama's q and k: llama.cpp interleaves the two halves of each head's rows; this puts them apart again."""
    kind = name.split(".")[-1] if not name.endswith(".bias") else name.split(".")[-2]
    if ".attn." not in name or kind not in ("q", "k"):
        return tensor
    d = config.layers[0].attention.head_dim
    rows = np.arange(tensor.shape[0]).reshape(-1, d // 2, 2).swapaxes(1, 2).ravel()
    return take_rows(tensor, rows)


def minus_one(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Gemma's norms: llama.cpp stores gain + 1."""
    if not name.endswith("norm"):
        return tensor
    return dense(floats(tensor.parts["weight"], tensor.format.dtype) - np.float32(1))
