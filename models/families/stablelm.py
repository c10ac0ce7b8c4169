"""StableLM 2 and 3B: Llama with layer norms, and positions for a quarter of each head; a parallel block in some."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import ModelConfig, layer_norms
from ..fields import flag, head_dim
from ..ropes import rope
from . import LLAMA, Family, Gguf, gguf

NAMES = LLAMA | {
    f"layers.{{i}}.attn.{part}_norm": f"model.layers.{{i}}.self_attn.{part}_layernorm.norms.{{h}}.weight"
    for part in "qk"
}
GGUF_NAMES = gguf.NAMES | {f"layers.{{i}}.attn.{part}_norm": f"blk.{{i}}.attn_{part}_norm.weight|flat" for part in "qk"}


def config(hf: Mapping) -> ModelConfig:
    parallel = flag(hf, "use_parallel_residual")
    return ModelConfig.llama_like(
        hf,
        ropes={"main": rope(hf, head_dim(hf), share=0.25)},
        attention={
            "bias": flag(hf, "use_qkv_bias"),
            "output_bias": False,
            "qk_norm": "heads" if flag(hf, "qk_layernorm") else None,
        },
        layer={"parallel": parallel, "shared_norm": parallel},
        **layer_norms(hf),
    )


def _from_gguf(metadata: Mapping, checkpoint) -> dict:
    hf = gguf.config(metadata, checkpoint, "stablelm", "StableLmForCausalLM")
    parallel = "blk.0.ffn_norm.weight" not in checkpoint
    norms = "blk.0.attn_q_norm.weight" in checkpoint
    return hf | {"use_qkv_bias": hf["attention_bias"], "use_parallel_residual": parallel, "qk_layernorm": norms}


stablelm = Family(
    "stablelm",
    model_types=("stablelm",),
    config=config,
    names=NAMES,
    gguf=Gguf("stablelm", GGUF_NAMES, _from_gguf),
    models="StableLM 3B, StableLM 2",
)
