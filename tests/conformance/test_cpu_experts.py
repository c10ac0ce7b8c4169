"""Experts are fetched when they are first needed and let go when memory is short, on the cpu backend."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from ondevice.backends.base import Backend, RouteRule
from ondevice.backends.cpu import create, weights
from ondevice.errors import BadFile
from ondevice.schemes import FP8, FP8_BLOCK, fp8_blocks, mxfp4_blocks, quantize_affine, row, to_dense
from ondevice.tensors import Blocks, Stack, Tensor, dense

pytest.importorskip("ondevice.backends.cpu._native", reason="the kernels are not compiled")

EXPERTS, ROWS, COLUMNS, K = 8, 32, 128, 2
NUMBERS = np.random.default_rng(5).standard_normal((EXPERTS, ROWS, COLUMNS)).astype(np.float32)


def mxfp4() -> Tensor:
    noise = np.random.default_rng(6)
    codes = noise.integers(0, 256, (EXPERTS, ROWS, COLUMNS // 32, 16), np.uint8)
    exponents = noise.integers(125, 129, (EXPERTS, ROWS, COLUMNS // 32), np.uint8)
    return Tensor((EXPERTS, ROWS, COLUMNS), Blocks("MXFP4"), {"weight": mxfp4_blocks(codes, exponents)})


def fp8() -> Tensor:
    codes = np.random.default_rng(8).integers(0, 120, (EXPERTS, ROWS, COLUMNS), np.uint8)
    scales = np.full((EXPERTS, ROWS, COLUMNS // FP8_BLOCK), 0.1, np.float32)
    return Tensor((EXPERTS, ROWS, COLUMNS), FP8, {"weight": fp8_blocks(codes, scales)})


TENSORS = {
    "float32": dense(NUMBERS),
    "bfloat16": to_dense(dense(NUMBERS), "bfloat16"),
    "fp8": fp8(),
    "affine": quantize_affine(NUMBERS, 4, 32, "float16"),
    "mxfp4": mxfp4(),
}


class Reading:
    """A stack over a tensor, and which of its experts were read."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.read, self.done = tensor, [], []
        self.stack = Stack(EXPERTS, self.piece, self.done.append)
        self.read.clear()

    def piece(self, expert: int) -> Tensor:
        self.read.append(expert)
        return row(self.tensor, expert)


@pytest.fixture(params=[False, True], ids=["default", "exact"])
def ops(request, monkeypatch) -> Iterator[Backend]:
    monkeypatch.setattr(weights, "memory_bytes", lambda: None)  # nobody but the test says how much there is
    made = create(exact=request.param, threads=2)
    yield made
    made.machine.residents.allow(1 << 60)


def product(ops: Backend, weight: object, ids: list[list[int]], seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((len(ids), COLUMNS)).astype(np.float32)
    logits = np.full((len(ids), EXPERTS), -9.0, np.float32)
    for token, chosen in enumerate(ids):
        logits[token, chosen] = 9 - np.arange(K)
    routing = ops.route(ops.array(logits), K, RouteRule())
    return ops.numpy(ops.expert_linear(ops.array(x), weight, routing))


@pytest.mark.parametrize("kind", TENSORS)
def test_those_chosen_are_read_once_and_say_what_a_whole_stack_says(kind, ops):
    reading = Reading(TENSORS[kind])
    weight, whole = ops.prepare(reading.stack), ops.prepare(TENSORS[kind])
    for ids in ([[3, 5]], [[5, 3], [1, 3]]):
        np.testing.assert_array_equal(product(ops, weight, ids), product(ops, whole, ids))
    assert sorted(set(reading.read)) == [0, 1, 3, 5]
    assert len(reading.read) == 4 or kind == "fp8"


@pytest.mark.parametrize("kind", TENSORS)
def test_those_not_needed_for_longest_go(kind, ops):
    reading, residents = Reading(TENSORS[kind]), ops.machine.residents
    before = residents.held
    weight, whole = ops.prepare(reading.stack), ops.prepare(TENSORS[kind])
    one = residents.held - before
    assert one > 0
    residents.allow(before + 3 * one)
    for ids in ([[1, 2]], [[3, 1]], [[2, 1]]):
        product(ops, weight, ids)
    assert residents.held == before + 3 * one
    reading.read.clear()
    product(ops, weight, [[1, 2], [3, 1]])
    assert reading.read == []
    product(ops, weight, [[2, 4]])  # 2 is needed: 1 or 3, which had their last turn with it, goes
    assert reading.read == [4] and residents.held == before + 3 * one
    noise = np.random.default_rng(1)
    for turn in range(20):
        ids = noise.permuted(np.tile(np.arange(EXPERTS), (3, 1)), axis=1)[:, :K].tolist()
        reading.read.clear()
        np.testing.assert_array_equal(product(ops, weight, ids, turn), product(ops, whole, ids, turn))
        assert not reading.read or residents.held <= before + max(3, len({e for pair in ids for e in pair})) * one
    ops.release(weight)
    del weight
    assert residents.held == before


def test_the_stacks_of_a_machine_share_its_memory(ops):
    readings = [Reading(TENSORS["affine"]) for _ in range(3)]
    residents, before = ops.machine.residents, ops.machine.residents.held
    made = [ops.prepare(reading.stack) for reading in readings]
    one = (residents.held - before) // 3
    residents.allow(before + 4 * one)
    for weight in made:
        product(ops, weight, [[1, 2]])
    assert residents.held == before + 4 * one
    readings[1].read.clear(), readings[2].read.clear(), readings[0].read.clear()
    for weight in made[::-1]:
        product(ops, weight, [[1, 2]])
    assert [sorted(reading.read) for reading in readings] == [[1, 2], [], []]


def test_what_cannot_be_read_is_said_and_may_be_read_later(ops):
    reading = Reading(TENSORS["affine"])
    weight, whole = ops.prepare(reading.stack), ops.prepare(TENSORS["affine"])
    reading.stack.__dict__["piece"], piece = _missing, reading.stack.piece
    with pytest.raises(BadFile, match="expert 4"):
        product(ops, weight, [[4, 0]])
    reading.stack.__dict__["piece"] = piece
    np.testing.assert_array_equal(product(ops, weight, [[4, 0]]), product(ops, whole, [[4, 0]]))


def _missing(expert: int) -> Tensor:
    raise BadFile(f"There is no expert {expert}.", "")


def test_gradients_flow_through_them(ops):
    weight, whole = ops.prepare(Reading(TENSORS["affine"]).stack), ops.prepare(TENSORS["affine"])
    ops.machine.residents.allow(0)
    x = np.random.default_rng(2).standard_normal((5, COLUMNS)).astype(np.float32)
    logits = np.random.default_rng(3).standard_normal((5, EXPERTS)).astype(np.float32)

    def gradient(weight: object) -> np.ndarray:
        def loss(params: dict, logits: object) -> tuple:
            routing = ops.route(logits, K, RouteRule())
            said = ops.combine(ops.expert_linear(params["x"], weight, routing), routing)
            return ops.sum(ops.token_loss(said, ops.array(np.arange(5, dtype=np.int32)))), None

        _, found = ops.value_and_grad(loss)({"x": ops.array(x)}, ops.array(logits))
        return ops.numpy(found["x"])

    np.testing.assert_array_equal(gradient(weight), gradient(whole))


def test_memory_is_asked_for(monkeypatch):
    """An eighth of what there is stays free, whatever experts would like."""
    monkeypatch.setattr(weights, "memory_bytes", lambda: 8_000_000)
    monkeypatch.setattr(weights, "used_bytes", lambda: 6_990_000)
    monkeypatch.setattr(weights, "free_bytes", lambda: 5_000_000)
    ops = create(threads=2)
    before, reading = ops.machine.residents.held, Reading(TENSORS["float32"])
    weight = ops.prepare(reading.stack)
    for pair in ([1, 2], [3, 4], [5, 6]):
        product(ops, weight, [pair])
    assert (
        ops.machine.residents.held - before == 2 * ROWS * COLUMNS * 4
    )  # those of the last call, though there is no room
