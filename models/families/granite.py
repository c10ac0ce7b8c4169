"""Granite: Llama with multipliers of the embedding, of what each half of a block adds, of scores and of logits.
GraniteMoE has experts, and some of its models an MLP for every token besides."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ..config import ModelConfig, plain_mlp, routed
from ..fields import layer_count, number, whole
from . import LLAMA, Family, Gguf, gguf

KEYS = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
MOE = "model.layers.{i}.block_sparse_moe"
SHARED = "model.layers.{i}.shared_mlp"
STORED = {  # ours -> in which of a file's tensors, as which of its rows, and what transformers calls that in memory
    "gate": ("input", "|first", "gate_up_proj"),
    "up": ("input", "|last", "gate_up_proj"),
    "down": ("output", "", "down_proj"),
}
MOE_NAMES = LLAMA | {
    "layers.{i}.moe.router": (f"{MOE}.router.layer.weight", f"{MOE}.router.weight|module"),
    **{
        f"layers.{{i}}.moe.{ours}": (
            f"{MOE}.{its[0]}_linear.weight{its[1]}",
            f"{MOE}.switch_mlp.{ours}_proj.weight|mlx",
            f"{MOE}.experts.{its[2]}{its[1]}|module",
        )
        for ours, its in STORED.items()
    },
    "layers.{i}.moe.shared.gate": f"{SHARED}.input_linear.weight|first",
    "layers.{i}.moe.shared.up": f"{SHARED}.input_linear.weight|last",
    "layers.{i}.moe.shared.down": f"{SHARED}.output_linear.weight",
}


def config(hf: Mapping) -> ModelConfig:
    moe = None
    if hf.get("model_type") != "granite":
        width = whole(hf, "shared_intermediate_size", 0, least=0) if hf["model_type"] == "granitemoeshared" else 0
        moe = routed(hf, "intermediate_size", shared=plain_mlp(hf, hidden=width, bias=False) if width else None)
    return ModelConfig.llama_like(
        hf,
        scale=number(hf, "attention_multiplier", 1.0),
        layer={"residual_scale": number(hf, "residual_multiplier", 1.0)},
        feed_forward=moe and [moe] * layer_count(hf),
        embed_scale=number(hf, "embedding_multiplier", 1.0),
        logit_scale=1 / number(hf, "logits_scaling", 1.0),
    )


def _moe_from_gguf(metadata: Mapping, checkpoint) -> dict:
    hf = gguf.config(metadata, checkpoint, "granitemoeshared", "GraniteMoeSharedForCausalLM", keys=KEYS)
    return hf | {
        "num_local_experts": hf.pop("num_experts", None),
        "shared_intermediate_size": hf.get("shared_expert_intermediate_size"),
    }


_from_gguf = partial(gguf.config, model_type="granite", architecture_class="GraniteForCausalLM", keys=KEYS)

granite = Family(
    "granite",
    ("granite",),
    config,
    LLAMA,
    Gguf("granite", gguf.NAMES, _from_gguf, gguf.unpermute, KEYS),
    models="Granite 3 (dense)",
)
granitemoe = Family(
    "granitemoe", ("granitemoe", "granitemoeshared"), config, MOE_NAMES,
    Gguf("granitemoe", gguf.NAMES, _moe_from_gguf, gguf.unpermute, KEYS),
    models="Granite MoE",
)  # fmt: skip
