"""GLM-4.5 and 4.6: positions for half of each head; the first layers plain, the others with experts elected as
DeepSeek-V3's, and one for all tokens."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import ModelConfig, elected, plain_mlp
from ..fields import flag, head_dim, whole
from ..ropes import rope
from . import LLAMA, Family, experts, shared_expert

MLP = "model.layers.{i}.mlp"
NAMES = LLAMA | experts(MLP) | shared_expert(MLP, "shared_experts") | {
    "layers.{i}.moe.router": f"{MLP}.gate.weight",
    "layers.{i}.moe.election": f"{MLP}.gate.e_score_correction_bias",
}  # fmt: skip


def config(hf: Mapping) -> ModelConfig:
    moe = elected({"moe_intermediate_size": 1408, **hf}, shared=1)
    dense = whole(hf, "first_k_dense_replace", 1, least=0)
    return ModelConfig.llama_like(
        hf,
        eps=1e-5,
        ropes={"main": rope(hf, head_dim(hf), share=0.5)},
        attention={"output_bias": False, "qk_norm": "head" if flag(hf, "use_qk_norm") else None},
        feed_forward=lambda layer: plain_mlp(hf) if layer < dense else moe,
    )


glm4_moe = Family("glm4_moe", ("glm4_moe",), config, NAMES, models="GLM-4.5 (Air), GLM-4.6")
