"""What a recorded plan holds on to, and what becomes of one that was not written to its end."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from ondevice.backends.base import LayerCache, Step
from ondevice.registry import create_backend
from ondevice.tensors import dense

pytest.importorskip("ondevice.backends.cpu._native", reason="the kernels are not compiled")
WIDTH = 16


def int32(value: int) -> np.ndarray:
    return np.array([value], np.int32)


@pytest.fixture
def ops():
    return create_backend("cpu", exact=True, threads=1)


@pytest.fixture
def forward(ops):
    """ids [1, 1] -> logits [1, 1, 8]"""
    draw = np.random.default_rng(0)
    table = ops.prepare(dense(draw.standard_normal((8, WIDTH)).astype(np.float32)))
    return lambda ids, step: ops.linear(ops.embed(table, ids), table)


def said(ops, run, token: int, cache) -> np.ndarray:
    step = Step(int32(0), int32(1), int32(0), cache=cache)
    return np.array(ops.numpy(run(ops.array(np.array([[token]], np.int32)), step)))


def test_a_plan_keeps_its_cache(ops, forward):
    """Else another one could come to stand at the same address, and pass for it."""
    cache = ops.new_cache([LayerCache(1, 8, 8)], 1, 16)
    run, kept = ops.compile(forward), weakref.ref(cache)
    said(ops, run, 1, cache)
    del cache
    gc.collect()
    assert kept() is not None


def test_a_plan_that_was_interrupted_is_not_replayed(ops, forward):
    class Interrupted(Exception):
        pass

    wild = []

    def now_and_then(ids, step):
        if wild:
            raise Interrupted
        return forward(ids, step)

    one, other = (ops.new_cache([LayerCache(1, 8, 8)], 1, 16) for _ in range(2))
    run, wanted = ops.compile(now_and_then), [said(ops, forward, token, None) for token in range(3)]
    assert np.array_equal(said(ops, run, 0, one), wanted[0])
    wild.append(True)
    with pytest.raises(Interrupted):
        said(ops, run, 1, other)
    wild.clear()
    for token in (1, 2):
        assert np.array_equal(said(ops, run, token, one), wanted[token])
