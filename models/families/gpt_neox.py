"""GPT-NeoX and Pythia: layer norms, a plain MLP beside attention, q, k and v interleaved head by head."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import ModelConfig, layer_norms
from ..fields import activation, flag, head_dim, number
from ..ropes import rope
from . import Family, Gguf, NameMap, gguf

NAMES = NameMap(
    {
        "embed": "gpt_neox.embed_in.weight",
        "norm": "gpt_neox.final_layer_norm.weight",
        "head": "embed_out.weight",
        "layers.{i}.attn_norm": "gpt_neox.layers.{i}.input_layernorm.weight",
        "layers.{i}.mlp_norm": "gpt_neox.layers.{i}.post_attention_layernorm.weight",
        "layers.{i}.attn.qkv": "gpt_neox.layers.{i}.attention.query_key_value.weight",
        "layers.{i}.attn.o": "gpt_neox.layers.{i}.attention.dense.weight",
        "layers.{i}.mlp.up": "gpt_neox.layers.{i}.mlp.dense_h_to_4h.weight",
        "layers.{i}.mlp.down": "gpt_neox.layers.{i}.mlp.dense_4h_to_h.weight",
    }
)


def config(hf: Mapping) -> ModelConfig:
    bias, share = flag(hf, "attention_bias", True), number(hf, "rotary_pct", 0.25)
    return ModelConfig.llama_like(
        {**hf, "num_key_value_heads": None},
        ropes={"main": rope(hf, head_dim(hf), base=number(hf, "rotary_emb_base", 10_000.0), share=share)},
        attention={"bias": bias, "output_bias": bias, "qkv": "grouped"},
        mlp={"gate": None, "bias": True, "act": activation(hf, default="gelu")},
        layer={"parallel": flag(hf, "use_parallel_residual", True)},
        **layer_norms(hf),
    )


def _from_gguf(metadata: Mapping, checkpoint) -> dict:
    parallel = metadata.get("gptneox.use_parallel_residual", True)
    return gguf.config(metadata, checkpoint, "gpt_neox", "GPTNeoXForCausalLM", use_parallel_residual=parallel)


gpt_neox = Family(
    "gpt_neox", model_types=("gpt_neox",), config=config, names=NAMES,
    gguf=Gguf("gptneox", gguf.NAMES, _from_gguf, gguf.by_head, {"use_parallel_residual": "use_parallel_residual"}),
    models="GPT-NeoX, Pythia",
)  # fmt: skip
