"""Results of a prompt take memory that its layers share, and that a token after it gives back, on the cpu backend."""

from __future__ import annotations

import numpy as np
import pytest

from ondevice.backends.cpu import create
from ondevice.models.config import ModelConfig
from ondevice.models.decoder import Decoder
from ondevice.models.random import random_weights
from ondevice.runtime.engine import Engine, GenerateOptions, Prefilled, Token

_native = pytest.importorskip("ondevice.backends.cpu._native", reason="the kernels are not compiled")

WIDTH, TOKENS = 256, 300
CONFIG = ModelConfig.llama_like({
    "hidden_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 50,
    "intermediate_size": WIDTH, "max_position_embeddings": 4000,
})  # fmt: skip


def test_buffers_are_used_again_and_given_back() -> None:
    arena = _native.Arena()
    first = arena.empty([1 << 16])
    place = first.ctypes.data
    del first
    assert arena.held == 4 << 16
    assert arena.empty([1 << 16]).ctypes.data == place
    assert arena.empty([60000]).ctypes.data == place, "a batch's lengths differ from the last one's by little"
    small = arena.empty([40000])
    assert small.ctypes.data != place, "nor may a large one be wasted"
    del small
    kept = arena.empty([1 << 10])
    arena.tidy()
    assert arena.held == kept.nbytes


def test_a_prompt_holds_few_results_and_a_token_none() -> None:
    ops = create(threads=2)
    engine = Engine(Decoder(CONFIG, ops, random_weights(CONFIG, ops, 32)), 400)
    ids, held, result = np.random.default_rng(3).integers(0, 50, TOKENS).tolist(), [], 4 * TOKENS * WIDTH
    for event in engine.generate(ids, GenerateOptions(3)):
        held += [ops.kernels.arena.held] if isinstance(event, Prefilled | Token) else []
    assert 0 < held[0] <= 12 * result
    assert held[-1] < result
