"""The strict backend: transparent to what keeps the contract (the suite, our models), closed to all else."""

from __future__ import annotations

import numpy as np
import pytest

from ondevice.backends.base import RouteRule, Step
from ondevice.backends.reference import create
from ondevice.models.decoder import Decoder
from ondevice.models.parameters import expected
from ondevice.registry import families
from ondevice.tensors import dense
from ondevice.testing.conformance import *  # noqa: F403
from ondevice.testing.family import check_decoder
from ondevice.testing.strict import Forbidden, StrictBackend

TINY = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": True, "attention_bias": False,
    "sliding_window": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
    "norm_topk_prob": True, "query_pre_attn_scalar": 8, "n_group": 2, "topk_group": 1,
    "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
OWN = {"granite4": {"layer_types": ["attention"] * 2, "num_local_experts": 0}}  # whose defaults are refused


@pytest.fixture(scope="module")
def backend():
    return StrictBackend(create())


@pytest.mark.parametrize("name", sorted(families()))
def test_our_models_keep_the_contract(name: str) -> None:
    family = families()[name]
    config = family.config({**TINY, **OWN.get(name, {}), "model_type": family.model_types[0]})
    random, strict, reference = np.random.default_rng(1), StrictBackend(create()), create()
    numbers = {n: random.standard_normal(s, np.float32) * s[-1] ** -0.5 for n, s in expected(config).items()}
    there, here = (
        Decoder(config, ops, {n: ops.prepare(dense(v.astype(np.float32))) for n, v in numbers.items()})
        for ops in (reference, strict)
    )
    ids = random.integers(0, 31, (2, 11)).astype(np.int32)
    want = reference.numpy(there(reference.array(ids), Step.whole(2, 11)))
    check_decoder(here, ids, want)
    assert {"embed", "linear"} <= strict.calls.keys()


TRESPASSES = {
    "minus": lambda a, w, ops: a - a,
    "division": lambda a, w, ops: a / 2.0,
    "power": lambda a, w, ops: a**2,
    "negation": lambda a, w, ops: -a,
    "indexing": lambda a, w, ops: a[0],
    "assignment": lambda a, w, ops: setattr(a, "shape", (2,)),
    "matmul": lambda a, w, ops: a @ a,
    "truth": lambda a, w, ops: a or None,
    "comparison": lambda a, w, ops: a == a,
    "length": lambda a, w, ops: len(a),
    "iteration": lambda a, w, ops: list(a),
    "dtype": lambda a, w, ops: a.dtype,
    "a method": lambda a, w, ops: a.transpose(0, 1),
    "a shape of NumPy's": lambda a, w, ops: a.reshape(np.int64(6)),
    "a host array": lambda a, w, ops: a + np.ones((2, 3), np.float32),
    "a host array on the left": lambda a, w, ops: np.ones((2, 3), np.float32) * a,
    "a number of NumPy's": lambda a, w, ops: a * np.float32(2),
    "a weight's shape": lambda a, w, ops: w.shape,
    "a weight in a sum": lambda a, w, ops: a + w,
    "another backend's array": lambda a, w, ops: a + StrictBackend(create()).zeros((2, 3)),
    "another backend's weight": lambda a, w, ops: StrictBackend(create()).dequantize(w),
    "a routing's insides": lambda a, w, ops: ops.route(a, 1, RouteRule()).rule,
    "starts of another type": lambda a, w, ops: ops.rope(
        a.reshape(1, 1, 1, 6), Step(*(np.zeros(1, np.int64),) * 3), np.ones(1, np.float32)
    ),
}


@pytest.mark.parametrize("name", TRESPASSES)
def test_trespasses_are_refused(name: str) -> None:
    ops = StrictBackend(create())
    array, weight = ops.array(np.ones((2, 3), np.float32)), ops.prepare(dense(np.ones((2, 3), np.float32)))
    with pytest.raises((Forbidden, TypeError, AttributeError)):
        TRESPASSES[name](array, weight, ops)
