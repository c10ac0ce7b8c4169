"""The decoder and its scope: rows, blocks one by one, who listens, and what adapters and trainable arrays change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ondevice.backends.base import Step
from ondevice.backends.reference import create as create_reference
from ondevice.models.decoder import Decoder
from ondevice.models.families import families
from ondevice.models.parameters import expected
from ondevice.models.random import random_weights
from ondevice.models.scope import Lora
from ondevice.tensors import dense
from ondevice.testing.family import open_decoder
from tests.models import twins

RANDOM = np.random.default_rng(5)
IDS = RANDOM.integers(0, 61, (2, 9)).astype(np.int32)


@pytest.fixture(params=["llama", "qwen3_moe"])
def decoder(request, twin_folder) -> Decoder:
    return open_decoder(twin_folder(request.param)[1], create_reference())


def run(decoder: Decoder, **arguments) -> np.ndarray:
    return decoder.ops.numpy(decoder(decoder.ops.array(IDS), Step.whole(*IDS.shape), **arguments))


def test_rows_are_places_of_all_rows(decoder):
    rows = np.array([0, 8, 9, 17, 9], np.int32)
    np.testing.assert_allclose(run(decoder, rows=rows), run(decoder).reshape(18, -1)[rows], rtol=1e-5, atol=1e-6)


def test_layer_by_layer_is_the_same(decoder):
    p, step = decoder.scope(), Step.whole(*IDS.shape)
    x = decoder.embed(p, decoder.ops.array(IDS))
    for i in range(len(decoder.config.layers)):
        x = decoder.block(p, i, x, step)
    assert np.array_equal(decoder.ops.numpy(decoder.head(p, x)), run(decoder))


def test_listeners_are_shown_everything_and_change_nothing(decoder):
    before, shown = run(decoder), {}
    decoder.listener = lambda name, x: shown.setdefault(name, x.shape)
    assert np.array_equal(run(decoder), before)
    assert shown["layers.1.attn.q.input"] == (2, 9, 36)
    assert shown["layers.1.attn.q"] == (2, 9, 6, 8) and shown["layers.1.attn.k"] == (2, 9, 2, 8)
    assert shown["layers.2.output"] == (2, 9, 36) and shown["logits"] == (2, 9, 61)
    assert shown.get("layers.0.moe.logits", (18, 5)) == (18, 5)
    linears = {n for n, shape in expected(decoder.config).items() if len(shape) == 2 and n != "embed"}
    assert {f"{name}.input" for name in linears} <= shown.keys()


def factors(shape: tuple[int, ...], rank: int) -> tuple[np.ndarray, np.ndarray]:
    """down and up, for an update of a weight of this shape."""
    down, up = (*shape[:-2], rank, shape[-1]), (*shape[:-1], rank)
    return RANDOM.normal(size=down).astype(np.float32), RANDOM.normal(size=up).astype(np.float32)


def test_adapters_are_what_they_stand_for(decoder):
    """Two adapters on every matrix, at once, give what the updated weights give. A head that is the embedding has
    adapters of its own, and its embedding's do not reach it."""
    ops, config = decoder.ops, replace(decoder.config, tied=False)
    matrices = {name: shape for name, shape in expected(config).items() if len(shape) > 1}
    weights = {**decoder.weights, "head": decoder.weights.get("head", decoder.weights["embed"])}
    loras, updated = {}, dict(weights)
    for name, shape in matrices.items():
        pairs = [factors(shape, 2), factors(shape, 3)]
        values = ops.numpy(ops.dequantize(weights[name])) + sum(0.1 * (up @ down) for down, up in pairs)
        updated[name] = ops.prepare(dense(values))
        if name == "embed":
            pairs = [(up, down.T.copy()) for down, up in pairs]
        loras[name] = [Lora(ops.array(down), ops.array(up), 0.1) for down, up in pairs]
    before, want = run(decoder), run(Decoder(config, ops, updated))
    decoder.loras = loras
    assert np.abs(run(decoder) - want).max() < 1e-3 * np.abs(want).max()
    assert np.abs(before - want).max() > 0.1 * np.abs(want).max()


def test_trainable_arrays_stand_in_for_weights(decoder):
    ops, name = decoder.ops, "layers.1.attn.v"
    values = ops.dequantize(decoder.weights[name])
    assert np.array_equal(run(decoder, trainable={name: values}), run(decoder))
    assert not np.allclose(run(decoder, trainable={name: values * 2.0}), run(decoder))


@pytest.mark.parametrize(("name", "bits"), [("llama", 16), ("qwen3", 4), ("gemma3", 32), ("qwen3_moe", 8)])
def test_random_weights_fit_every_family(name, bits):
    config = twins.make(name, hidden_size=64, intermediate_size=64, head_dim=16, num_attention_heads=4).config
    family = families()[name]
    hf = config.to_dict() | ({"moe_intermediate_size": 32} if "moe" in name else {})
    decoder = Decoder(family.config(hf), ops := create_reference(), random_weights(family.config(hf), ops, bits))
    logits = run(decoder)
    assert logits.shape == (2, 9, 61) and np.isfinite(logits).all()
