"""LFM2: most layers mix tokens by a short gated convolution, some by attention with a norm on each head of q and k.
LFM2-MoE has experts in all layers but the first ones, elected with a bias."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..config import ConvolutionConfig, MLPConfig, ModelConfig, MoEConfig, elected, plain_mlp
from ..fields import each_layer, flag, head_dim, number, several, whole
from ..ropes import rope
from . import LLAMA, Family, Gguf, experts, gguf

OWN = {
    "attn_norm": "operator_norm.weight", "mlp_norm": "ffn_norm.weight", "attn.o": "self_attn.out_proj.weight",
    "attn.q_norm": "self_attn.q_layernorm.weight", "attn.k_norm": "self_attn.k_layernorm.weight",
    "conv.in": "conv.in_proj.weight", "conv.taps": "conv.conv.weight|kernels", "conv.out": "conv.out_proj.weight",
    "mlp.gate": "feed_forward.w1.weight", "mlp.up": "feed_forward.w3.weight", "mlp.down": "feed_forward.w2.weight",
}  # fmt: skip
NAMES = LLAMA | {"norm": "model.embedding_norm.weight"} | {
    f"layers.{{i}}.{ours}": f"model.layers.{{i}}.{its}" for ours, its in OWN.items()
}  # fmt: skip
MLP = "model.layers.{i}.feed_forward"
MOE = NAMES | experts(MLP, "w1", "w3", "w2") | {
    "layers.{i}.moe.router": f"{MLP}.gate.weight",
    "layers.{i}.moe.election": f"{MLP}.expert_bias",
    **{f"layers.{{i}}.mlp.{ours}": (f"{MLP}.{its}.weight", f"{MLP}.{ours}_proj.weight|mlx")
       for ours, its in (("gate", "w1"), ("up", "w3"), ("down", "w2"))},
}  # fmt: skip


def config(hf: Mapping) -> ModelConfig:
    attends = several(hf, "full_attn_idxs", int)
    kinds = each_layer(hf, "layer_types", str, lambda i: "full_attention" if i in attends else "conv")
    convolution = ConvolutionConfig(
        whole(hf, "hidden_size"), whole(hf, "conv_L_cache", 3, least=2), flag(hf, "conv_bias")
    )
    return ModelConfig.llama_like(
        {**hf, "layer_types": None},
        tied=flag(hf, "tie_embedding", True),
        ropes={"main": rope(hf, head_dim(hf), 1_000_000.0)},
        attention={"qk_norm": "head"},
        mixers=lambda i: convolution if kinds[i] == "conv" else None,
        feed_forward=_feed_forward(hf),
        norm_eps=number(hf, "norm_eps", 1e-5),
    )


def _feed_forward(hf: Mapping) -> Callable[[int], MLPConfig | MoEConfig]:
    if hf.get("model_type") != "lfm2_moe":
        return lambda layer: plain_mlp(hf, hidden=_hidden(hf), bias=False)
    dense, moe = whole(hf, "num_dense_layers", 2, least=0), elected(hf, election=flag(hf, "use_expert_bias", True))
    return lambda layer: plain_mlp(hf, bias=False) if layer < dense else moe


def _hidden(hf: Mapping) -> int:
    """The MLP's width: two thirds of what the file says, scaled and rounded up, unless it says to take it as it is."""
    hidden = whole(hf, "block_ff_dim", whole(hf, "intermediate_size", 12288))
    if not flag(hf, "block_auto_adjust_ff_dim", True):
        return hidden
    multiple = whole(hf, "block_multiple_of", 256)
    hidden = int(number(hf, "block_ffn_dim_multiplier", 1.0) * int(2 * hidden / 3))
    return multiple * -(-hidden // multiple)


KEYS = {"conv_L_cache": "shortconv.l_cache"}
MOE_KEYS = KEYS | {"num_dense_layers": "leading_dense_block_count"}
GGUF_NAMES = gguf.NAMES | {
    "norm": "token_embd_norm.weight",
    "layers.{i}.conv.in": "blk.{i}.shortconv.in_proj.weight",
    "layers.{i}.conv.taps": "blk.{i}.shortconv.conv.weight",
    "layers.{i}.conv.out": "blk.{i}.shortconv.out_proj.weight",
}


def _from_gguf(metadata: Mapping, checkpoint, *kind: str) -> dict:
    """Which layers attend, its key heads say: none where there is a convolution."""
    hf = gguf.config(metadata, checkpoint, *kind, keys=MOE_KEYS, block_auto_adjust_ff_dim=False)
    heads = several(hf, "num_key_value_heads", int)
    kinds = ["full_attention" if n else "conv" for n in heads]
    return hf | {
        "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0,
        "norm_eps": hf.get("rms_norm_eps"), "layer_types": kinds, "num_key_value_heads": max(heads, default=None),
        "conv_bias": "blk.0.shortconv.in_proj.bias" in checkpoint,
    }  # fmt: skip


def _gguf(architecture: str, keys: Mapping[str, str], *kind: str) -> Gguf:
    return Gguf(architecture, GGUF_NAMES, lambda m, checkpoint: _from_gguf(m, checkpoint, *kind), keys=keys)


lfm2 = Family(
    "lfm2", model_types=("lfm2",), config=config, names=NAMES,
    gguf=_gguf("lfm2", KEYS, "lfm2", "Lfm2ForCausalLM"), models="LFM2",
)  # fmt: skip
lfm2_moe = Family(
    "lfm2_moe", model_types=("lfm2_moe",), config=config, names=MOE,
    gguf=_gguf("lfm2moe", MOE_KEYS, "lfm2_moe", "Lfm2MoeForCausalLM"), models="LFM2-MoE",
)  # fmt: skip
