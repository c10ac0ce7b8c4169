"""The numerics of quantize against plain restatements in float64: GPTQ, fits, allocation, sensitivity."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from ondevice.backends.base import Step
from ondevice.models.decoder import Decoder
from ondevice.registry import create_backend
from ondevice.schemes import parts, quantize_affine, to_float
from ondevice.tensors import Affine, dense
from ondevice.tools.calibration import stream
from ondevice.tools.quantize import sensitivity
from ondevice.tools.quantize.allocation import Choice, allocate, choices
from ondevice.tools.quantize.awq import _choose, scaling
from ondevice.tools.quantize.fitting import decode, encode, fit
from ondevice.tools.quantize.gptq import feedback, gptq, inverse_factor, remaining, search
from ondevice.tools.quantize.matrices import affine_bytes
from ondevice.tools.quantize.sensitivity import Cost, Measured, measure
from ondevice.tools.quantize.statistics import Inputs
from tests.tools.wide_models import LLAMA, MOE, parameters, write_model


def problem(rows=6, columns=128, seed=0):
    """A matrix, and the second moments of inputs that hang together."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(400, columns)) @ (draw.normal(size=(columns, columns)) * np.exp(-np.arange(columns) / 20))
    return draw.normal(size=(rows, columns)).astype(np.float32), x.T @ x / len(x)


def damped(hessian, damping=0.01):
    return hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))


def plain_gptq(values, hessian, form):
    """One column after the other; what is left moves to where the error is least, by the inverse of the rest of H."""
    left, hessian = values.astype(np.float64).copy(), damped(hessian)
    columns = left.shape[1]
    remaining = np.array([1 / np.linalg.inv(hessian[j:, j:])[0, 0] for j in range(columns)])
    made = np.empty_like(left)
    for j in range(columns):
        at = j // form.group_size * form.group_size
        if j == at:
            end = at + form.group_size
            scale, bias = fit(left[:, at:end].T.astype(np.float32), remaining[at:end], form)
        made[:, j] = decode(encode(left[:, j], scale, bias, form.bits), scale, bias)
        inverse = np.linalg.inv(hessian[j:, j:])
        left[:, j + 1 :] -= np.outer((left[:, j] - made[:, j]) / inverse[0, 0], inverse[0, 1:])
    return made


def lost(tensor, values, hessian):
    error = to_float(tensor).astype(np.float64) - values
    return np.einsum("ij,jk,ik", error, hessian, error)


@pytest.mark.parametrize(("bits", "group", "dtype"), [(2, 32, "float32"), (4, 64, "bfloat16"), (3, 128, "float16")])
def test_gptq_is_the_plain_algorithm(bits, group, dtype):
    values, hessian = problem()
    form = Affine(bits, group, dtype)
    made, wanted = to_float(gptq(values, feedback(hessian), form)), plain_gptq(values, hessian, form)
    same = np.isclose(made, wanted, rtol=1e-4, atol=1e-5)
    assert same.mean() > 0.99  # a tie may fall the other way in float32, and then what follows differs as well
    assert lost(gptq(values, feedback(hessian), form), values, damped(hessian)) == pytest.approx(
        np.einsum("ij,jk,ik", wanted - values, damped(hessian), wanted - values), rel=0.02
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_each_method_loses_less_than_the_one_before(bits):
    values, hessian = problem(rows=64, seed=bits)
    form = Affine(bits, 64, "float32")
    nearest, searched, fed_back = (
        lost(made, values, hessian)
        for made in (quantize_affine(values, bits, 64, "float32"), search(values, np.diag(hessian), form),
                     gptq(values, feedback(hessian), form))
    )  # fmt: skip
    assert fed_back < 0.9 * searched < searched < nearest * (1.0 if bits < 8 else 1.05)


def test_many_rows_are_rounded_as_few_are(monkeypatch):
    values, hessian = problem(rows=37)
    form = Affine(4, 64, "bfloat16")
    whole = gptq(values, feedback(hessian), form)
    monkeypatch.setattr("ondevice.tools.quantize.gptq.ROWS", 5)
    pieces = gptq(values, feedback(hessian), form)
    assert (parts(whole).codes == parts(pieces).codes).mean() > 0.999


def test_inputs_that_never_come_do_no_harm():
    values, hessian = problem()
    hessian[:, 7] = hessian[7] = 0
    assert np.isfinite(to_float(gptq(values, feedback(hessian), Affine(4, 64, "float32")))).all()
    assert np.isfinite(to_float(gptq(values, feedback(np.zeros_like(hessian)), Affine(4, 64, "float32")))).all()


@pytest.mark.parametrize("size", [3, 64, 65, 200])
def test_the_factor_of_the_inverse(size):
    draw = np.random.default_rng(size).normal(size=(size + 5, size))
    hessian = draw.T @ draw
    upper = inverse_factor(hessian, 0.01)
    assert np.allclose(upper.T @ upper @ damped(hessian), np.eye(size), atol=1e-9)
    assert not np.tril(upper, -1).any()
    assert np.allclose(remaining(hessian, 0.01), 1 / np.diag(upper) ** 2)


def test_what_came_from_a_lattice_goes_back_to_it():
    """Weights that were 4-bit once are found again, whatever their least value."""
    draw = np.random.default_rng(1)
    codes = draw.integers(0, 16, (8, 64))
    codes[:, [0, 32]], codes[:, [1, 33]] = 0, 15
    values = (codes.reshape(8, 2, 32) * draw.uniform(0.01, 0.1, (8, 2, 1)) - 0.3).reshape(8, 64).astype(np.float32)
    assert np.abs(to_float(search(values, np.ones(64), Affine(4, 32, "float32"))) - values).max() < 1e-6


@pytest.mark.parametrize("bits", [2, 3])
def test_a_fit_is_near_the_best_there_is(bits):
    draw = np.random.default_rng(2)
    group, weights = draw.standard_t(4, size=(32, 20)).astype(np.float32), draw.uniform(0.1, 3, 32)
    scales, biases = fit(group, weights, Affine(bits, 32, "float32"))
    ours = weights @ (group - decode(encode(group, scales, biases, bits), scales, biases)) ** 2
    best = np.full(20, np.inf)
    low, span = group.min(0), np.ptp(group, 0)
    for start, share in itertools.product(np.linspace(0, 0.5, 26), np.linspace(0.3, 1.05, 46)):
        scale, bias = share * span / (2**bits - 1), low + start * span
        best = np.minimum(best, weights @ (group - decode(encode(group, scale, bias, bits), scale, bias)) ** 2)
    assert (ours < 2 * best).all() and ours.sum() < 1.1 * best.sum()


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
def test_a_group_of_one_value_stays_so(value):
    made = to_float(search(np.full((3, 64), value, np.float32), np.ones(64), Affine(4, 64, "float32")))
    assert np.allclose(made, value, atol=1e-6)


# ------------------------------------------------------------------------------------------------ AWQ


def louder(values, columns):
    """Some columns of what a norm gives are large: trained models are so."""
    values = values.copy()
    values[columns] *= 20
    return values


@pytest.mark.parametrize("changes", [{}, {"norm_offset": 1.0}], ids=["plain", "offset"])
def test_scaling_changes_nothing_before_rounding(tmp_path, changes):
    gain = louder(np.ones(64, np.float32), [3, 40])
    source = write_model(tmp_path / "in", dtype="bfloat16", layers_0_attn_norm=gain, layers_1_mlp_norm=gain)
    held, ops = parameters(source), create_backend("reference")
    config = replace(held._config, **changes)
    ids = np.random.default_rng(0).integers(0, 90, (4, 32)).astype(np.int32)
    weights = held.prepare(ops)
    before = ops.numpy(Decoder(config, ops, weights)(ops.array(ids), Step.whole(*ids.shape)))
    for stage in stream(config, held, ops, ids):
        if not stage.prefix.startswith("layers."):
            continue
        inputs = Inputs(sized=True)
        stage.observe(inputs)
        plan = {name: Affine(3, 32, "bfloat16") for name in stage.names if len(held.shapes[name]) == 2}
        found = scaling(stage.prefix, config, held, inputs, plan)
        maps = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up", "mlp.down")
        assert set(found.columns) == {f"{stage.prefix}.{name}" for name in maps}
        assert np.ptp(found.columns[f"{stage.prefix}.mlp.down"]) > 0.1
        for name in stage.names:
            values = found.applied(name, to_float(held[name])) if name in plan else to_float(held[name])
            weights[name] = ops.prepare(found.norms.get(name, dense(values.astype(np.float32))))
    after = ops.numpy(Decoder(config, ops, weights)(ops.array(ids), Step.whole(*ids.shape)))
    assert np.abs(after - before).max() < 2e-3 * np.abs(before).max()
    assert not np.array_equal(
        to_float(held["layers.0.attn_norm"]), ops.numpy(ops.dequantize(weights["layers.0.attn_norm"]))
    )


def test_loud_columns_lose_less():
    draw = np.random.default_rng(0)
    x = louder(draw.normal(size=(64, 500)), [1, 5, 33]).T
    values, inputs = draw.normal(size=(48, 64)).astype(np.float32), Inputs(sized=True)
    inputs("a.input", x.astype(np.float32))
    held = type("Held", (), {"values": values})
    form = Affine(3, 32, "float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ondevice.tools.quantize.awq.numbers", lambda held, name: held.values)
        scale = _choose(["a"], held, inputs, {"a": form})
    gram = inputs.gram("a")
    plain = to_float(quantize_affine(values, 3, 32, "float32")) - values
    scaled = to_float(quantize_affine(values * scale, 3, 32, "float32")) / scale - values
    assert np.einsum("ij,jk,ik", scaled, gram, scaled) < 0.5 * np.einsum("ij,jk,ik", plain, gram, plain)


# ------------------------------------------------------------------------------------------------ allocation


def test_allocation_is_the_best_of_all():
    form = Affine(4, 64, "float16")
    for seed in range(30):
        draw = np.random.default_rng(seed)
        table = {
            name: [Choice(form, 8 * int(draw.integers(1, 60)), float(draw.uniform())) for _ in range(4)]
            for name in "abcde"
        }
        for room in (100, 333, 700, 5000):
            plans = [p for p in itertools.product(*table.values()) if sum(c.nbytes for c in p) + 50 <= room]
            if not plans:
                continue
            found = allocate(table, room, 50)
            assert sum(c.nbytes for c in found.values()) + 50 <= room
            assert sum(c.cost for c in found.values()) == pytest.approx(min(sum(c.cost for c in p) for p in plans))


def test_allocation_of_sizes_without_a_common_divisor(monkeypatch):
    monkeypatch.setattr("ondevice.tools.quantize.allocation.UNITS", 64)
    form = Affine(4, 64, "float16")
    table = {str(i): [Choice(form, 1009 * n + i, 1 / n) for n in (2, 3, 4, 5)] for i in range(9)}
    least = sum(several[0].nbytes for several in table.values())
    for room in (least, least + 1, least + 3000, 10**6):
        assert sum(c.nbytes for c in allocate(table, room).values()) <= room
    assert all(c.cost == 0.2 for c in allocate(table, 10**6).values())


def test_choices_cost_less_the_more_they_take(tmp_path):
    held = parameters(write_model(tmp_path / "in"))
    cost = Cost(np.random.default_rng(0).uniform(0, 1, 64), np.random.default_rng(1).uniform(0, 1, 96))
    found = choices(held, "layers.0.mlp.down", cost)
    assert [(c.form.bits, c.form.group_size) for c in found] == [(bits, 32) for bits in (2, 3, 4, 5, 6, 8)]
    assert [c.cost for c in found] == sorted((c.cost for c in found), reverse=True)
    for choice in found:
        made = search(to_float(held["layers.0.mlp.down"]), cost.inputs, choice.form)
        assert made.nbytes == choice.nbytes == affine_bytes((64, 96), choice.form)
        error = to_float(made) - to_float(held["layers.0.mlp.down"])
        assert choice.cost == pytest.approx(0.5 * cost.outputs @ error**2 @ cost.inputs, rel=1e-4)


def test_some_rows_stand_for_all(tmp_path, monkeypatch):
    held = parameters(write_model(tmp_path / "in"))
    cost = Cost(np.random.default_rng(0).pareto(1.0, 96), np.ones(64))
    exact = [c.cost for c in choices(held, "layers.0.mlp.up", cost)]
    monkeypatch.setattr("ondevice.tools.quantize.allocation.ROWS", 24)
    assert np.allclose([c.cost for c in choices(held, "layers.0.mlp.up", cost)], exact, rtol=0.25)


# ------------------------------------------------------------------------------------------------ sensitivity


def predictions(held, config, ops, ids, changed):
    weights = held.prepare(ops) | {name: ops.prepare(dense(values)) for name, values in changed.items()}
    logits = ops.numpy(Decoder(config, ops, weights)(ops.array(ids), Step.whole(*ids.shape))).astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("hf", [LLAMA, MOE | {"num_experts_per_tok": 4}], ids=["llama", "moe"])
def test_costs_foretell_the_divergence(tmp_path, monkeypatch, hf):
    """Small noise on one matrix: its divergence, averaged over draws, against the estimate. Without feedback, all of
    an input's second moment counts."""
    monkeypatch.setattr(sensitivity, "remaining", np.diag)
    held, ops = parameters(write_model(tmp_path / "in", hf, "float32")), create_backend("cpu", exact=True)
    config, draw = held._config, np.random.default_rng(4)
    ids = draw.integers(0, 90, (24, 32)).astype(np.int32)
    *steps, measured = measure(config, held, ops, ids)
    assert isinstance(measured, Measured) and steps[-1] == (14, 14)
    before = predictions(held, config, ops, ids, {})
    for name in [name for name in held if len(held.shapes[name]) > 1 and "router" not in name]:
        noise = [draw.normal(size=held.shapes[name]).astype(np.float32) * 3e-3 for _ in range(4)]
        after = [predictions(held, config, ops, ids, {name: to_float(held[name]) + error}) for error in noise]
        actual = np.mean([(np.exp(before) * (before - changed)).sum(-1).mean() for changed in after])
        foretold = np.mean([measured.costs[name].of(error) for error in noise])
        assert 1 / 3 < foretold / actual < 3, name


def test_inputs_are_summed_once_for_maps_that_share_them():
    draw, inputs = np.random.default_rng(0), Inputs()
    batches = [draw.normal(size=(2, 5, 8)).astype(np.float32) for _ in range(3)]
    for x in batches:
        for name in ("q", "k"):
            inputs(f"{name}.input", x.copy())
        inputs("o.input", x * 2)
        inputs("output", x)
    every = np.concatenate(batches).reshape(-1, 8).astype(np.float64)
    assert np.allclose(inputs.gram("q"), every.T @ every / 30) and np.allclose(inputs.gram("o"), 4 * inputs.gram("k"))
    assert inputs.source("k") == "q" and len(inputs._sums) == 2


@pytest.mark.parametrize("own", [False, True])
def test_experts_see_the_tokens_that_they_were_given(own):
    draw, inputs = np.random.default_rng(0), Inputs()
    ids = np.array([[0, 2], [2, 0], [0, 3]], np.int32)
    x = draw.normal(size=(3, 2, 4) if own else (3, 4)).astype(np.float32)
    inputs("up.experts", ids), inputs("up.input", x)
    given = [[(0, 0), (1, 1), (2, 0)], [], [(0, 1), (1, 0)], [(2, 1)]]
    for expected, (count, gram) in zip(given, inputs.expert_grams("up", 4), strict=True):
        rows = np.array([x[t, k] if own else x[t] for t, k in expected]).reshape(-1, 4).astype(np.float64)
        assert count == len(rows) and np.allclose(gram, rows.T @ rows / max(count, 1))
