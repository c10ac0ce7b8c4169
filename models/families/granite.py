"""Granite: Llama with multipliers of the embedding, of what each half of a block adds, of scores and of logits.
GraniteMoE has experts, and some of its models an MLP for every token besides."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ..config import ModelConfig, plain_mlp, routed
from ..fields import number, whole
from . import LLAMA, Family, Gguf, gguf, joined

KEYS = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
MOE = "model.layers.{i}.block_sparse_moe"
SHARED = "model.layers.{i}.shared_mlp"
STORED = [(f"{MOE}.input_linear.weight", f"{MOE}.output_linear.weight"),
          (f"{MOE}.experts.gate_up_proj|module", f"{MOE}.experts.down_proj|module")]  # fmt: skip
MOE_NAMES = LLAMA | joined("moe", *STORED, mlx=f"{MOE}.switch_mlp") | {
    "layers.{i}.moe.router": (f"{MOE}.router.layer.weight", f"{MOE}.router.weight|module"),
    **joined("moe.shared", (f"{SHARED}.input_linear.weight", f"{SHARED}.output_linear.weight")),
}  # fmt: skip


def config(hf: Mapping) -> ModelConfig:
    moe = None
    if hf.get("model_type") != "granite":
        width = whole(hf, "shared_intermediate_size", 0, least=0) if hf["model_type"] == "granitemoeshared" else 0
        moe = routed(hf, "intermediate_size", shared=plain_mlp(hf, hidden=width, bias=False) if width else None)
    return ModelConfig.llama_like(
        hf,
        scale=number(hf, "attention_multiplier", 1.0),
        layer={"residual_scale": number(hf, "residual_multiplier", 1.0)},
        feed_forward=moe and (lambda layer: moe),
        input_scale=number(hf, "embedding_multiplier", 1.0),
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
