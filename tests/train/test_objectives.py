"""Preferences against the papers' formulas in torch; distillation against its own; what cannot go together."""

from __future__ import annotations

import numpy as np
import pytest

from ondevice.errors import OnDeviceError
from ondevice.runtime.session import open_session
from ondevice.train import Settings, StepDone, load_data, train
from ondevice.train.objectives import Orpo
from tests.tiny_model import write_tiny_model

from .conftest import write_lines
from .oracle import peft_preferences
from .test_oracle import stirred


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    lines = [
        {"prompt": [{"role": "user", "content": f"{a} and {b}?"}], "chosen": f"It is {a + b}.", "rejected": f"No {a}!"}
        for a in range(4)
        for b in range(4)
    ]
    return write_lines(tmp_path_factory.mktemp("preferences") / "pairs.jsonl", lines)


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_preferences_against_the_papers(tiny, session, preferences, tmp_path, objective):
    settings = Settings(steps=8, objective=objective, learning_rate=3e-3, rank=4, beta=0.3, batch_size=3, micro_batch=2)
    data = load_data(preferences, session, 64, preference=True, validation=0)
    begin = stirred(session, settings)
    list(train(session, data, Settings(**settings.as_dict() | {"steps": 0}), tmp_path / "begin", initial=begin))
    steps = [e for e in train(session, data, settings, initial=begin) if isinstance(e, StepDone)]
    theirs = list(peft_preferences(tiny, tmp_path / "begin", data, settings))
    assert steps[-1].loss < 0.9 * steps[0].loss
    np.testing.assert_allclose([s.loss for s in steps], [loss for loss, _ in theirs], atol=2e-4)
    np.testing.assert_allclose([s.gradient_norm for s in steps], [norm for _, norm in theirs], rtol=2e-3)


def test_orpo_s_slopes_are_its_loss_s():
    draw = np.random.default_rng(0)
    logprobs, counts = -draw.uniform(1, 30, 8), draw.integers(1, 9, 8).astype(float)
    objective = Orpo(0.4)
    _, slopes = objective.pairs(None, logprobs, counts)
    for i in range(8):
        moved = [objective.pairs(None, logprobs + d * np.eye(8)[i], counts)[0].sum() for d in (1e-5, -1e-5)]
        assert slopes[i] == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-4, abs=1e-9)


def test_packed_preferences(session, preferences):
    data = load_data(preferences, session, 64, preference=True, validation=0)
    plain = Settings(steps=1, objective="dpo", shuffle=False, batch_size=16)
    packed = Settings(steps=1, objective="dpo", shuffle=False, batch_size=16, pack=True, max_length=256)
    begin = stirred(session, plain)
    (one,), (other,) = (
        [e for e in train(session, data, s, initial=begin) if isinstance(e, StepDone)] for s in (plain, packed)
    )
    assert one.loss == pytest.approx(other.loss, abs=1e-5)
    assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-4)


def test_a_preference_without_its_parts(session, tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [{"prompt": "a", "chosen": "b"}])
    with pytest.raises(OnDeviceError, match=r"data.jsonl:1.*no 'rejected'"):
        load_data(path, session, 64, preference=True)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Another model than the student: the tiny one with other numbers in its head."""
    from safetensors.numpy import load_file, save_file

    folder = write_tiny_model(tmp_path_factory.mktemp("teacher") / "model")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"][::-1].copy()
    save_file(weights, folder / "model.safetensors")
    with open_session(folder, backend="cpu", exact=True) as opened:
        yield opened


def test_the_divergence_from_a_teacher(session, teacher, data_file):
    """KL(teacher || student) of softened predictions, from their logits."""
    from ondevice.train.batches import make_batch
    from ondevice.train.learner import Learner, Teacher
    from ondevice.train.methods import make_method

    data = load_data(data_file, session, 64, validation=0)
    batch = make_batch(data.train, [[0], [7]])
    learner = Learner(make_method(session, Settings()), teacher=Teacher(teacher.decoder, 2.0, 0.25))
    ids = session.backend.array(batch.ids)

    def logprobs(opened, soft):
        logits = opened.backend.numpy(opened.decoder(ids, batch.step, batch.places)).astype(np.float64) * soft
        return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)

    wanted, ours = logprobs(teacher, 0.5), logprobs(session, 0.5)
    divergence = (np.exp(wanted) * (wanted - ours)).sum(-1)
    targets = batch.targets.reshape(-1)[batch.places]
    hard = -logprobs(session, 1.0)[np.arange(len(targets)), targets]
    np.testing.assert_allclose(learner.losses({}, batch), 0.75 * 4 * divergence + 0.25 * hard, rtol=1e-4, atol=1e-5)


def test_a_student_comes_closer(session, teacher, data_file):
    data = load_data(data_file, session, 64, validation=0)
    settings = Settings(steps=30, objective="distill", method="full", learning_rate=1e-2)
    losses = [e.loss for e in train(session, data, settings, teacher=teacher) if isinstance(e, StepDone)]
    assert losses[-1] < 0.2 * losses[0]


def test_what_cannot_go_together(session, teacher, data_file):
    data = load_data(data_file, session, 64)
    for settings, given in (
        (Settings(objective="distill"), None),
        (Settings(), teacher),
        (Settings(method="prompt", objective="dpo"), None),
        (Settings(method="dora", targets=("embed_tokens",)), None),
    ):
        with pytest.raises(OnDeviceError):
            next(train(session, data, settings, teacher=given))
