"""LFM2: most layers mix tokens by a short gated convolution, some by attention with a norm on each head of q and k."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import ConvolutionConfig, ModelConfig
from ..fields import flag, head_dim, layer_count, number, several, whole
from ..ropes import rope
from . import LLAMA, Family

OWN = {
    "norm": "model.embedding_norm.weight",
    "attn_norm": "operator_norm", "mlp_norm": "ffn_norm", "attn.o": "self_attn.out_proj",
    "attn.q_norm": "self_attn.q_layernorm", "attn.k_norm": "self_attn.k_layernorm",
    "conv.in": "conv.in_proj", "conv.taps": "conv.conv", "conv.out": "conv.out_proj",
    "mlp.gate": "feed_forward.w1", "mlp.up": "feed_forward.w3", "mlp.down": "feed_forward.w2",
}  # fmt: skip
NAMES = LLAMA | {
    ours if ours == "norm" else f"layers.{{i}}.{ours}": its if ours == "norm" else f"model.layers.{{i}}.{its}.weight"
    for ours, its in OWN.items()
}


def config(hf: Mapping) -> ModelConfig:
    width, attends = whole(hf, "hidden_size"), several(hf, "full_attn_idxs", int)
    kinds = several(hf, "layer_types", str) or [
        "full_attention" if i in attends else "conv" for i in range(layer_count(hf))
    ]
    convolution = ConvolutionConfig(width, whole(hf, "conv_L_cache", 3, least=2), flag(hf, "conv_bias"))
    attention = {**hf, "layer_types": None, "intermediate_size": _hidden(hf)}
    return ModelConfig.llama_like(
        attention,
        tied=flag(hf, "tie_embedding", True),
        ropes={"main": rope(hf, head_dim(hf), 1_000_000.0)},
        attention={"qk_norm": "head"},
        mixers=lambda i: convolution if kinds[i] == "conv" else None,
        norm_eps=number(hf, "norm_eps", 1e-5),
    )


def _hidden(hf: Mapping) -> int:
    """The MLP's width: two thirds of what the file says, scaled and rounded up, unless it says to take it as it is."""
    hidden = whole(hf, "block_ff_dim", whole(hf, "intermediate_size", 12288))
    if not flag(hf, "block_auto_adjust_ff_dim", True):
        return hidden
    multiple = whole(hf, "block_multiple_of", 256)
    hidden = int(number(hf, "block_ffn_dim_multiplier", 1.0) * int(2 * hidden / 3))
    return multiple * -(-hidden // multiple)


lfm2 = Family("lfm2", model_types=("lfm2",), config=config, names=NAMES)
