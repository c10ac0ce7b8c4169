"""Arcee (AFM): Llama whose feed-forward has no gate and squares what is positive."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ..config import ModelConfig
from ..fields import activation
from . import LLAMA, Family, Gguf, gguf


def config(hf: Mapping) -> ModelConfig:
    return ModelConfig.llama_like(hf, eps=1e-5, mlp={"gate": None, "act": activation(hf, default="relu2")})


_from_gguf = partial(gguf.config, model_type="arcee", architecture_class="ArceeForCausalLM")

arcee = Family(
    "arcee", ("arcee",), config, LLAMA, Gguf("arcee", gguf.NAMES, _from_gguf, gguf.unpermute), models="Arcee AFM 4.5B"
)
