"""Tiny models made by transformers, and adapters on them made by PEFT, both random; each made once."""

from __future__ import annotations

import copy
import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ondevice.registry import create_backend, probe_backends
from ondevice.runtime.session import Session, open_session
from ondevice.testing.family import TINY, logits_of, randomise

MODELS = {  # name -> transformers' config and model, what differs from TINY
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": False}),
    "tied": ("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "biased": ("LlamaConfig", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "wide": (  # rows that MLX's groups of 32 divide
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "head_dim": 16,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"sliding_window": 5, "sliding_window_pattern": 2, "query_pre_attn_scalar": 24},
    ),
    "moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True, "moe_intermediate_size": 12},
    ),
}
IDS = np.random.default_rng(0).integers(0, TINY["vocab_size"], (2, 13)).astype(np.int32)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory):
    """name -> (transformers' model, its folder)"""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()

    @cache
    def make(name: str) -> tuple[Any, Path]:
        config, kind, own = MODELS[name]
        made = randomise(getattr(transformers, kind)(getattr(transformers, config)(**TINY | own)))
        folder = tmp_path_factory.mktemp("models") / name
        made.save_pretrained(folder)
        if name == "moe":  # mlx-lm knows the config as it was before transformers 5
            hf = json.loads((folder / "config.json").read_text())
            hf |= {"num_experts": hf["num_local_experts"], "rope_theta": hf["rope_parameters"]["rope_theta"]}
            (folder / "config.json").write_text(json.dumps(hf))
        return made, folder

    return make


@pytest.fixture(scope="session")
def lora(model, tmp_path_factory: pytest.TempPathFactory):
    """(name of a model, seed, settings of LoraConfig) -> (PEFT's model, the folder it saved)"""
    peft = pytest.importorskip("peft")

    made: dict[str, tuple[Any, Path]] = {}

    def make(name: str, seed: int = 1, **settings: Any) -> tuple[Any, Path]:
        key = f"{name} {seed} {settings}"
        if key not in made:
            made[key] = fresh(name, seed, settings)
        return made[key]

    def fresh(name: str, seed: int, settings: dict[str, Any]) -> tuple[Any, Path]:
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False} | settings)
        adapted = stirred(peft.get_peft_model(copy.deepcopy(model(name)[0]), config), seed)
        folder = tmp_path_factory.mktemp("adapters")
        adapted.save_pretrained(folder)
        return adapted, folder

    return make


def stirred(adapted: Any, seed: int) -> Any:
    """Everything trainable moved, by much: an adapter that did nothing would prove nothing."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            own = parameter.data if "lora_" not in name or "magnitude" in name else 0
            parameter.data = own + (0.2 if parameter.ndim == 1 else 0.15) * noise
    return adapted.eval()


@pytest.fixture(scope="session")
def created():
    return cache(partial(create_backend, exact=True))


@pytest.fixture(params=["reference", "cpu", "cuda", "mlx"])
def backend(request: pytest.FixtureRequest, created):
    probe = probe_backends()[request.param]
    if not probe.ready:
        pytest.skip(f"{request.param}: {probe.reason}")
    return created(request.param)


@pytest.fixture
def opened(model):
    """(name of a model, backend) -> a session on it, closed behind the test"""
    sessions: list[Session] = []

    def open_it(name: str | Path, backend: Any = "reference") -> Session:
        folder = model(name)[1] if isinstance(name, str) else name
        sessions.append(open_session(folder, backend=backend, exact=True))
        return sessions[-1]

    yield open_it
    for session in sessions:
        session.close()


def says(adapted: Any) -> np.ndarray:
    """A torch model's logits for IDS."""
    return logits_of(adapted, IDS)
