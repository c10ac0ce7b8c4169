"""GPT-2: layer norms, a plain MLP, learned positions; q, k and v in one matrix; matrices stored transposed."""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import Unsupported
from ..config import ModelConfig, layer_norms
from ..fields import activation, flag, layer_count, whole
from . import Family, Gguf, NameMap, gguf

MODULES = {
    "wte": "embed", "wpe": "positions", "ln_f": "norm", "h.{i}.ln_1": "layers.{i}.attn_norm",
    "h.{i}.ln_2": "layers.{i}.mlp_norm", "h.{i}.attn.c_attn": "layers.{i}.attn.qkv",
    "h.{i}.attn.c_proj": "layers.{i}.attn.o", "h.{i}.mlp.c_fc": "layers.{i}.mlp.up",
    "h.{i}.mlp.c_proj": "layers.{i}.mlp.down",
}  # fmt: skip
NAMES = NameMap({"head": "lm_head.weight"}) | {  # matrices as [in, out], which mlx-lm turns round
    ours: (f"transformer.{its}.weight{'|T' if '.c_' in its else ''}", f"model.{its}.weight|mlx")
    for its, ours in MODULES.items()
}
SIZES = {"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers",
         "n_positions": "max_position_embeddings", "n_inner": "intermediate_size"}  # fmt: skip


def config(hf: Mapping) -> ModelConfig:
    hf = {**hf, **{llama: hf[key] for key, llama in SIZES.items() if key in hf}}
    hf |= {"num_key_value_heads": None, "head_dim": None}  # never a GPT-2's
    if flag(hf, "scale_attn_by_inverse_layer_idx") or flag(hf, "add_cross_attention"):
        raise Unsupported("This GPT-2 scales its scores by layer, or reads another model.", "Take a plain GPT-2.")
    inner = whole(hf, "intermediate_size", 4 * whole(hf, "hidden_size"))
    act = activation(hf, "activation_function", "gelu_new")
    return ModelConfig.llama_like(
        hf,
        tied=True,
        ropes={},
        scale=None if flag(hf, "scale_attn_weights", True) else 1.0,
        attention={"qkv": "fused", "bias": True, "output_bias": True},
        mlp={"gate": None, "bias": True, "hidden": inner, "act": act},
        positions=whole(hf, "max_position_embeddings"),
        **layer_norms(hf, "layer_norm_epsilon"),
    )


def _from_gguf(metadata: Mapping, checkpoint) -> dict:
    hf = gguf.config(metadata, checkpoint, "gpt2", "GPT2LMHeadModel")
    layer_count(hf)
    return hf | {key: hf.get(llama) for key, llama in SIZES.items()} | {"layer_norm_epsilon": hf.get("layer_norm_eps")}


gpt2 = Family("gpt2", ("gpt2",), config, NAMES, Gguf("gpt2", gguf.NAMES, _from_gguf), models="GPT-2")
