"""Small models whose rows hold groups of 32 and 64: random weights, tiny_model's tokenizer and template."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ondevice.checkpoint import Spec, open_checkpoint, write_folder
from ondevice.models.families import family_for, family_of
from ondevice.models.parameters import Parameters, expected
from ondevice.tensors import Dense, Tensor, store
from tests.tiny_model import CHATML, tokenizer

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 112, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 10000.0,
}  # fmt: skip
MOE = LLAMA | {
    "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96,
    "norm_topk_prob": True, "head_dim": 16, "tie_word_embeddings": False, "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}  # fmt: skip


def write_model(folder: Path, hf: dict | None = None, dtype: str = "bfloat16", **changed: np.ndarray) -> Path:
    """A folder with everything; `changed` replaces parameters, by our names with `_` for `.`."""
    hf = {**(hf or LLAMA), "vocab_size": tokenizer().get_vocab_size(), "dtype": dtype}
    family, draw, specs = family_for(hf, folder), np.random.default_rng(5), []
    for name, shape in expected(family.config(hf)).items():
        values = 1 + 0.1 * draw.normal(size=shape) if len(shape) == 1 else draw.normal(size=shape) * 0.15
        values = changed.get(name.replace(".", "_"), values.astype(np.float32))
        specs += _specs(family.names.spell(name), values, dtype)
    described = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    side = {"tokenizer.json": tokenizer().to_str(), "tokenizer_config.json": json.dumps(described)}
    write_folder(folder, hf, specs, {name: text.encode() for name, text in side.items()})
    return folder


def _specs(name: str, values: np.ndarray, dtype: str) -> list[Spec]:
    named = {name: values}
    if "{e}" in name:
        named = {name.replace("{e}", str(e)): part for e, part in enumerate(values)}
    return [
        Spec(n, v.shape, Dense(dtype), lambda v=v: Tensor(v.shape, Dense(dtype), {"weight": store(v, dtype)}))
        for n, v in named.items()
    ]


def parameters(path: Path) -> Parameters:
    checkpoint = open_checkpoint(path)
    family, config = family_of(checkpoint)
    return Parameters(family, family.config(config), checkpoint)
