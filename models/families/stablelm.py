"""StableLM 2 and 3B: Llama with layer norms, and positions for a quarter of each head; a parallel block in some."""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import Unsupported
from ..config import ModelConfig
from ..fields import flag, head_dim, number
from ..ropes import rope
from . import LLAMA, Family, Gguf, gguf


def config(hf: Mapping) -> ModelConfig:
    if flag(hf, "qk_layernorm"):
        raise Unsupported("This StableLM norms each head of q and k by gains of its own.", "Take a smaller StableLM.")
    parallel = flag(hf, "use_parallel_residual")
    return ModelConfig.llama_like(
        hf,
        ropes={"main": rope(hf, head_dim(hf), share=0.25)},
        attention={"bias": flag(hf, "use_qkv_bias"), "output_bias": False},
        layer={"parallel": parallel, "shared_norm": parallel},
        norm="layer",
        norm_bias=True,
        norm_eps=number(hf, "layer_norm_eps", 1e-5),
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
    names=LLAMA,
    gguf=Gguf("stablelm", gguf.NAMES, _from_gguf),
    models="StableLM 3B, StableLM 2 1.6B",
)
