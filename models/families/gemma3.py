"""Gemma 3 (text): norms before and behind each half of a block, q/k norms, five windowed layers to each full one with a
rotary base of its own, a scaled embedding, gains stored minus one."""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import Unsupported
from ..config import ModelConfig
from ..fields import activation, flag, head_dim, layer_count, number, optional, whole
from ..ropes import ropes_by_window
from . import SANDWICH, Family, Gguf, gguf

USUAL = {  # what the configs of those that also see leave out
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208, "max_position_embeddings": 131072,
}  # fmt: skip


def config(hf: Mapping) -> ModelConfig:
    if flag(hf, "use_bidirectional_attention"):
        raise Unsupported("This Gemma looks both ways: it embeds text and does not write any.", "Take another model.")
    hf = {**USUAL, **hf}
    pattern = whole(hf, "sliding_window_pattern", whole(hf, "_sliding_window_pattern", 6))
    hf = {**hf, "head_dim": head_dim(hf, 256), "sliding_window": whole(hf, "sliding_window", 4096)}
    return ModelConfig.llama_like(
        hf,
        tied=True,
        ropes=ropes_by_window(hf, hf["head_dim"], 1_000_000.0, 10_000.0),
        scale=number(hf, "query_pre_attn_scalar", 256) ** -0.5,
        softcap=optional(number, hf, "attn_logit_softcapping"),
        attention={"qk_norm": "head"},
        mlp={"act": activation(hf, "hidden_activation", "gelu_pytorch_tanh")},
        layer={"post_norms": True},
        sliding=lambda layer: (layer + 1) % pattern != 0,
        embed_scale=whole(hf, "hidden_size") ** 0.5,
        norm_offset=1.0,
        logit_softcap=optional(number, hf, "final_logit_softcapping"),
    )


def _from_gguf(metadata: Mapping, checkpoint) -> dict:
    hf = gguf.config(metadata, checkpoint, "gemma3_text", "Gemma3ForCausalLM")
    largest = layer_count(hf) == 62  # the 27B model alone scales its scores by width per head
    scalar = whole(hf, "hidden_size") // whole(hf, "num_attention_heads") if largest else head_dim(hf)
    return {"query_pre_attn_scalar": scalar, "hidden_activation": "gelu_pytorch_tanh"} | hf


gemma3 = Family(
    "gemma3", model_types=("gemma3_text",), config=config, names=SANDWICH,
    gguf=Gguf("gemma3", gguf.SANDWICH, _from_gguf, arrange=gguf.minus_one),
    models="Gemma 3 (text)",
)  # fmt: skip
