"""GLM-4: Llama with interleaved positions for half of each head, biases on q, k and v, gate and up in one matrix; the
0414 models have norms behind each half of a block as well."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ..config import ModelConfig
from ..fields import flag, head_dim
from ..ropes import rope
from . import LLAMA, Family, Gguf, gguf

NAMES = LLAMA | {
    "layers.{i}.attn_post_norm": "model.layers.{i}.post_self_attn_layernorm.weight",
    "layers.{i}.mlp_post_norm": "model.layers.{i}.post_mlp_layernorm.weight",
}
GGUF_NAMES = gguf.SANDWICH | {"layers.{i}.mlp.gate_up": "blk.{i}.ffn_up.weight"}


def config(hf: Mapping) -> ModelConfig:
    hf = {**hf, "head_dim": head_dim(hf, 128)}
    return ModelConfig.llama_like(
        hf,
        eps=1.5625e-07,
        ropes={"main": rope(hf, hf["head_dim"], share=0.5, interleaved=True)},
        attention={"bias": flag(hf, "attention_bias", True), "output_bias": False},
        mlp={"gate": "fused"},
        layer={"post_norms": hf.get("model_type") == "glm4"},
    )


_from_gguf = partial(gguf.config, model_type="glm4", architecture_class="Glm4ForCausalLM")

glm4 = Family(
    "glm4",
    model_types=("glm4", "glm"),
    config=config,
    names=NAMES,
    gguf=Gguf("glm4", GGUF_NAMES, _from_gguf),
    models="GLM-4 (9B chat, 0414)",
)
