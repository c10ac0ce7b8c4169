"""Nemotron and Minitron: layer norms whose gains are stored minus one, a feed-forward without a gate that squares
what is positive, positions for half of each head."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ..config import ModelConfig, layer_norms
from ..fields import activation, head_dim
from ..ropes import rope
from . import LLAMA, Family, Gguf, gguf


def config(hf: Mapping) -> ModelConfig:
    return ModelConfig.llama_like(
        hf,
        ropes={"main": rope(hf, head_dim(hf), share=0.5)},
        mlp={"gate": None, "act": activation(hf, default="relu2")},
        norm_offset=1.0,
        **layer_norms(hf, "norm_eps"),
    )


KEYS = {"norm_eps": "attention.layer_norm_epsilon"}
_from_gguf = partial(gguf.config, model_type="nemotron", architecture_class="NemotronForCausalLM", keys=KEYS)

nemotron = Family(
    "nemotron", ("nemotron",), config, LLAMA,
    Gguf("nemotron", gguf.NAMES, _from_gguf, gguf.minus_one, KEYS), models="Nemotron 4 (Mini), Minitron",
)  # fmt: skip
