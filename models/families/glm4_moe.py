"""GLM-4.5 and 4.6: positions for half of each head; the first layers plain, the others with experts elected as
DeepSeek-V3's, and one for all tokens."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import ModelConfig, elected, plain_mlp
from ..fields import flag, head_dim, whole
from ..ropes import rope
from . import LLAMA, Family, Gguf, experts, gguf, shared_expert

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


GGUF_NAMES = gguf.NAMES | {"layers.{i}.mlp_norm": "blk.{i}.post_attention_norm.weight"}
KEYS = {
    "n_routed_experts": "expert_count",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
}


def _from_gguf(metadata: Mapping, checkpoint) -> dict:
    hf = gguf.config(metadata, checkpoint, "glm4_moe", "Glm4MoeForCausalLM", keys=KEYS)
    return hf | {"use_qk_norm": "blk.0.attn_q_norm.weight" in checkpoint}


glm4_moe = Family(
    "glm4_moe", ("glm4_moe",), config, NAMES, Gguf("glm4moe", GGUF_NAMES, _from_gguf, keys=KEYS),
    models="GLM-4.5 (Air), GLM-4.6",
)  # fmt: skip
