"""The reference: against the suite that it defines, against central differences and against PyTorch."""

from __future__ import annotations

import numpy as np
import pytest

from ondevice.backends.base import AttentionSpec, LayerCache, RouteRule, Step
from ondevice.backends.reference import create
from ondevice.errors import BadOption, Unsupported
from ondevice.testing.conformance import *  # noqa: F403
from ondevice.testing.gradients import TRAINABLES, Trainable, central_differences, draw, gradients


@pytest.fixture(scope="module")
def backend():
    return create()


@pytest.mark.parametrize("t", TRAINABLES, ids=lambda t: t.name)
def test_gradients_are_central_differences(t: Trainable) -> None:
    ops, random = create(dtype="float64"), np.random.default_rng(5)
    params, frozen = draw(t, random)
    probe = random.standard_normal(1024)
    grads = gradients(t, ops, params, frozen, probe)[2]
    for name, want in central_differences(t, ops, params, frozen, probe).items():
        assert grads[name].dtype == np.float64
        np.testing.assert_allclose(grads[name], want, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"threads": 2}])
def test_options_that_make_no_sense(options) -> None:
    with pytest.raises(BadOption):
        create(**options)


def test_unknown_scoring() -> None:
    with pytest.raises(Unsupported):
        RouteRule(scoring="softmx")


def test_a_cache_is_not_trained_through() -> None:
    ops = create()
    step = Step.whole(1, 2)
    step = Step(step.starts, step.lengths, step.slots, cache=ops.new_cache([LayerCache(1, 4, 4)], 1, 4))

    def loss(params):
        y = ops.attention(params["x"], params["x"], params["x"], None, AttentionSpec(1.0), step, 0)
        return ops.sum(y), None

    with pytest.raises(Unsupported):
        ops.value_and_grad(loss)({"x": ops.array(np.ones((1, 2, 1, 4), np.float32))})


# ------------------------------------------------------------------------------------------------ beside PyTorch


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


def agree(ops, y, want, tolerance: float = 2e-6) -> None:
    np.testing.assert_allclose(ops.numpy(y), want.detach().numpy(), rtol=tolerance * 10, atol=tolerance)


def test_attention_is_torchs(torch, backend) -> None:
    q, k, v = random(2, 9, 6, 8), random(2, 9, 2, 8), random(2, 9, 2, 5)
    y = backend.attention(*(backend.array(x) for x in (q, k, v)), None, AttentionSpec(0.3), Step.whole(2, 9), 0)
    heads = (torch.from_numpy(x).transpose(1, 2) for x in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, scale=0.3, enable_gqa=True)
    agree(backend, y, want.transpose(1, 2))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_are_torchs(torch, backend, offset) -> None:
    x, gain, bias = random(3, 4, 16), random(16), random(16, 1)[:, 0]
    functional, (tx, tg, tb) = torch.nn.functional, (torch.from_numpy(a) for a in (x, gain, bias))
    ax, ag, ab = (backend.array(a) for a in (x, gain, bias))
    agree(backend, backend.rms_norm(ax, ag, 1e-5, offset), functional.rms_norm(tx, (16,), tg + offset, 1e-5))
    agree(backend, backend.layer_norm(ax, ag, ab, 1e-5), functional.layer_norm(tx, (16,), tg, tb, 1e-5))


@pytest.mark.parametrize(
    ("kind", "name"),
    [("silu", "silu"), ("gelu", "gelu"), ("relu", "relu"), ("sigmoid", "sigmoid"), ("tanh", "tanh")],
)
def test_activations_are_torchs(torch, backend, kind, name) -> None:
    x = random(5, 40) * 4
    agree(backend, backend.act(backend.array(x), kind), getattr(torch.nn.functional, name)(torch.from_numpy(x)))


def test_gelu_tanh_and_relu2_are_torchs(torch, backend) -> None:
    x, functional = random(5, 40) * 4, torch.nn.functional
    tanh, relu = functional.gelu(torch.from_numpy(x), approximate="tanh"), functional.relu(torch.from_numpy(x))
    agree(backend, backend.act(backend.array(x), "gelu_tanh"), tanh)
    agree(backend, backend.act(backend.array(x), "relu2"), relu * relu)


def test_rope_is_transformers(backend) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    import torch

    x, turns = random(1, 7, 2, 8), (10000.0 ** (-np.arange(0, 8, 2) / 8)).astype(np.float32)
    angles = torch.arange(3, 10)[:, None].float() * torch.from_numpy(turns)
    cos, sin = (f(torch.cat([angles, angles], -1))[None] for f in (torch.cos, torch.sin))
    want = llama.apply_rotary_pos_emb(torch.from_numpy(x), torch.from_numpy(x), cos, sin, unsqueeze_dim=2)[0]
    step = Step(np.array([3], np.int32), np.array([7], np.int32), np.array([0], np.int32))
    agree(backend, backend.rope(backend.array(x), step, turns), want)


def test_losses_are_torchs(torch, backend) -> None:
    logits, teacher = random(5, 11), random(5, 10 + 1) * 2
    targets = np.array([3, 0, -1, 10, 4], np.int32)
    functional, tx = torch.nn.functional, torch.from_numpy(logits)
    want = functional.cross_entropy(tx, torch.from_numpy(targets).long(), ignore_index=-1, reduction="none")
    agree(backend, backend.token_loss(backend.array(logits), backend.array(targets)), want)
    soft = functional.cross_entropy(tx, functional.softmax(torch.from_numpy(teacher), -1), reduction="none")
    agree(backend, backend.token_loss(backend.array(logits), backend.array(teacher)), soft)


def test_adamw_is_torchs(torch, backend) -> None:
    p, grads = random(4, 5), [random(4, 5) * s for s in (1.0, -0.3, 2.0)]
    held = torch.nn.Parameter(torch.from_numpy(p.copy()))
    optimizer = torch.optim.AdamW([held], lr=0.02, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.1)
    current, state = {"p": backend.array(p)}, {}
    for step, grad in enumerate(grads, 1):
        held.grad = torch.from_numpy(grad)
        optimizer.step()
        moved = {"p": backend.array(grad)}
        current, state = backend.adamw(current, moved, state, step, 0.02, (0.8, 0.9), 1e-7, 0.1)
    agree(backend, current["p"], held)


def test_softmax_router_is_transformers(torch, backend) -> None:
    """Qwen3-MoE's: softmax over all, the best k, renormalised."""
    logits = random(9, 8)
    routing = backend.route(backend.array(logits), 3, RouteRule())
    gates, ids = torch.topk(torch.softmax(torch.from_numpy(logits), -1), 3)
    agree(backend, routing.gates, gates / gates.sum(-1, keepdim=True))
    assert backend.numpy(routing.ids).tolist() == ids.tolist()
