"""LFM2: most layers mix tokens by a short gated convolution, some by attention with a norm on each head of q and k.
LFM2-MoE has experts in all layers but the first ones, elected with a bias."""

from __future__ import annotations

from collections.abc import Mapping

from ...backends.base import RouteRule
from ..config import ConvolutionConfig, ModelConfig, plain_mlp, routed
from ..fields import flag, head_dim, layer_count, number, several, whole
from ..ropes import rope
from . import LLAMA, Family, Gguf, experts, gguf

OWN = {
    "attn_norm": "operator_norm.weight", "mlp_norm": "ffn_norm.weight", "attn.o": "self_attn.out_proj.weight",
    "attn.q_norm": "self_attn.q_layernorm.weight", "attn.k_norm": "self_attn.k_layernorm.weight",
    "conv.in": "conv.in_proj.weight", "conv.taps": "conv.conv.weight|kernels", "conv.out": "conv.out_proj.weight",
    "mlp.gate": "feed_forward.w1.weight", "mlp.up": "feed_forward.w3.weight", "mlp.down": "feed_forward.w2.weight",
}  # fmt: skip
MLP = "model.layers.{i}.feed_forward"
MOE = {"layers.{i}.moe.router": f"{MLP}.gate.weight", "layers.{i}.moe.election": f"{MLP}.expert_bias"}
NAMES = LLAMA | experts(MLP, "w1", "w3", "w2") | MOE | {"norm": "model.embedding_norm.weight"} | {
    f"layers.{{i}}.{ours}": f"model.layers.{{i}}.{its}" for ours, its in OWN.items()
}  # fmt: skip


def config(hf: Mapping) -> ModelConfig:
    width, attends = whole(hf, "hidden_size"), several(hf, "full_attn_idxs", int)
    kinds = several(hf, "layer_types", str) or [
        "full_attention" if i in attends else "conv" for i in range(layer_count(hf))
    ]
    convolution = ConvolutionConfig(width, whole(hf, "conv_L_cache", 3, least=2), flag(hf, "conv_bias"))
    return ModelConfig.llama_like(
        {**hf, "layer_types": None},
        tied=flag(hf, "tie_embedding", True),
        ropes={"main": rope(hf, head_dim(hf), 1_000_000.0)},
        attention={"qk_norm": "head"},
        mixers=lambda i: convolution if kinds[i] == "conv" else None,
        feed_forward=_feed_forward(hf, len(kinds)),
        norm_eps=number(hf, "norm_eps", 1e-5),
    )


def _feed_forward(hf: Mapping, count: int) -> list:
    if hf.get("model_type") != "lfm2_moe":
        return [plain_mlp(hf, hidden=_hidden(hf), bias=False)] * count
    scale = number(hf, "routed_scaling_factor", 1.0)
    rule = RouteRule("sigmoid", renormalise=flag(hf, "norm_topk_prob", True), scale=scale)
    moe = routed(hf, "moe_intermediate_size", rule=rule, election=flag(hf, "use_expert_bias", True))
    dense = min(whole(hf, "num_dense_layers", 2, least=0), count)
    return [plain_mlp(hf, bias=False)] * dense + [moe] * (count - dense)


def _hidden(hf: Mapping) -> int:
    """The MLP's width: two thirds of what the file says, scaled and rounded up, unless it says to take it as it is."""
    hidden = whole(hf, "block_ff_dim", whole(hf, "intermediate_size", 12288))
    if not flag(hf, "block_auto_adjust_ff_dim", True):
        return hidden
    multiple = whole(hf, "block_multiple_of", 256)
    hidden = int(number(hf, "block_ffn_dim_multiplier", 1.0) * int(2 * hidden / 3))
    return multiple * -(-hidden // multiple)


KEYS = {"conv_L_cache": "shortconv.l_cache"}
GGUF_NAMES = gguf.NAMES | {
    "norm": "token_embd_norm.weight",
    "layers.{i}.conv.in": "blk.{i}.shortconv.in_proj.weight",
    "layers.{i}.conv.taps": "blk.{i}.shortconv.conv.weight",
    "layers.{i}.conv.out": "blk.{i}.shortconv.out_proj.weight",
}


def _from_gguf(metadata: Mapping, checkpoint) -> dict:
    """Which layers attend, its key heads say: none where there is a convolution."""
    hf = gguf.config(metadata, checkpoint, "lfm2", "Lfm2ForCausalLM", keys=KEYS, block_auto_adjust_ff_dim=False)
    heads = several(hf, "num_key_value_heads", int)
    kinds = ["full_attention" if n else "conv" for n in heads]
    return hf | {
        "norm_eps": hf.get("rms_norm_eps"), "layer_types": kinds, "num_key_value_heads": max(heads, default=None),
        "conv_bias": "blk.0.shortconv.in_proj.bias" in checkpoint,
    }  # fmt: skip


lfm2 = Family(
    "lfm2", model_types=("lfm2", "lfm2_moe"), config=config, names=NAMES,
    gguf=Gguf("lfm2", GGUF_NAMES, _from_gguf, keys=KEYS), models="LFM2, LFM2-MoE",
)  # fmt: skip
