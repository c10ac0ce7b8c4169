"""GPT-2: layer norms, a plain MLP, learned positions; q, k and v in one matrix; matrices stored transposed."""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import Unsupported
from ..config import ModelConfig
from ..fields import activation, flag, layer_count, number, whole
from . import Family, Gguf, NameMap, gguf

OURS = {  # module of a block -> ours
    "ln_1": "attn_norm", "ln_2": "mlp_norm", "attn.c_attn": "attn.qkv", "attn.c_proj": "attn.o", "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}  # fmt: skip
MODEL = {"wte": "embed", "wpe": "positions", "ln_f": "norm"}
SIZES = {"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers",
         "n_positions": "max_position_embeddings", "n_inner": "intermediate_size"}  # fmt: skip


def _places(module: str) -> tuple[str, ...]:
    """transformers' names, with the prefix and without, its matrices as [in, out]; mlx-lm's, which turns them round."""
    turned = "|T" if ".c_" in module else ""
    return f"transformer.{module}.weight{turned}", f"{module}.weight{turned}", f"model.{module}.weight|mlx"


NAMES = NameMap(
    {"head": "lm_head.weight"}
    | {ours: _places(module) for module, ours in MODEL.items()}
    | {f"layers.{{i}}.{ours}": _places(f"h.{{i}}.{module}") for module, ours in OURS.items()}
)


def config(hf: Mapping) -> ModelConfig:
    hf = {**hf, **{llama: hf[key] for key, llama in SIZES.items() if key in hf}}
    hf |= {"intermediate_size": hf.get("n_inner") or 4 * whole(hf, "hidden_size")}
    hf |= {"num_key_value_heads": None, "head_dim": None}  # never a GPT-2's
    if flag(hf, "scale_attn_by_inverse_layer_idx") or flag(hf, "add_cross_attention"):
        raise Unsupported("This GPT-2 scales its scores by layer, or reads another model.", "Take a plain GPT-2.")
    return ModelConfig.llama_like(
        hf,
        tied=True,
        ropes={},
        scale=None if flag(hf, "scale_attn_weights", True) else 1.0,
        attention={"qkv": "fused", "bias": True, "output_bias": True},
        mlp={"gate": None, "bias": True, "act": activation(hf, "activation_function", "gelu_new")},
        norm="layer",
        norm_bias=True,
        norm_eps=number(hf, "layer_norm_epsilon", 1e-5),
        positions=whole(hf, "max_position_embeddings"),
    )


def _from_gguf(metadata: Mapping, checkpoint) -> dict:
    hf = gguf.config(metadata, checkpoint, "gpt2", "GPT2LMHeadModel")
    layer_count(hf)
    return hf | {key: hf.get(llama) for key, llama in SIZES.items()} | {"layer_norm_epsilon": hf.get("layer_norm_eps")}


gpt2 = Family(
    "gpt2", model_types=("gpt2",), config=config, names=NAMES, gguf=Gguf("gpt2", gguf.NAMES, _from_gguf), models="GPT-2"
)
