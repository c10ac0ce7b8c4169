"""Command R and R7B (Cohere, Cohere2): attention and MLP side by side behind one layer norm, interleaved positions, in
Cohere2 only where there is a window."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import ModelConfig
from ..fields import flag, head_dim, number, whole
from ..ropes import rope
from . import LLAMA, Family, Gguf, gguf

NAMES = LLAMA | {
    f"layers.{{i}}.attn.{part}_norm": f"model.layers.{{i}}.self_attn.{part}_norm.weight|flat" for part in "qk"
}
GGUF_NAMES = gguf.NAMES | {f"layers.{{i}}.attn.{part}_norm": f"blk.{{i}}.attn_{part}_norm.weight|flat" for part in "qk"}


def config(hf: Mapping) -> ModelConfig:
    second, pattern = hf.get("model_type") == "cohere2", whole(hf, "sliding_window_pattern", 4)
    return ModelConfig.llama_like(
        {"sliding_window": 4096, **hf},
        tied=True,
        ropes={"main": rope(hf, head_dim(hf), base=10_000.0 if second else 500_000.0, interleaved=True)},
        sliding=lambda layer: second and (layer + 1) % pattern != 0,
        attention={"qk_norm": "heads" if flag(hf, "use_qk_norm") else None},
        turns=lambda layer, slides: slides or not second,
        layer={"parallel": True, "shared_norm": True},
        norm="layer",
        norm_eps=number(hf, "layer_norm_eps", 1e-5),
        logit_scale=number(hf, "logit_scale", 0.0625),
    )


def _gguf(architecture: str, *kind: str) -> Gguf:
    def read(metadata: Mapping, checkpoint) -> dict:
        normed = "blk.0.attn_q_norm.weight" in checkpoint
        return gguf.config(metadata, checkpoint, *kind) | {"use_qk_norm": normed}

    return Gguf(architecture, GGUF_NAMES, read)


cohere = Family(
    "cohere", ("cohere",), config, NAMES, _gguf("command-r", "cohere", "CohereForCausalLM"), models="Command R, R+, Aya"
)
cohere2 = Family(
    "cohere2", ("cohere2",), config, LLAMA, _gguf("cohere2", "cohere2", "Cohere2ForCausalLM"), models="Command R7B"
)
