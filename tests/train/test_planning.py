"""The planner: fast where there is room, lean where there is not; and the lean way gives the same gradients."""

from __future__ import annotations

import pytest

from ondevice.errors import OnDeviceError
from ondevice.train import Settings, StepDone, load_data, train
from ondevice.train.planning import plan


@pytest.fixture
def data(session, data_file):
    return load_data(data_file, session, 64, validation=0)


def test_from_fast_to_lean(session, data):
    settings = Settings(batch_size=16)
    wide = plan(session, data, settings, 10_000)
    assert (wide.micro_batch, wide.remat) == (16, False)
    again = plan(session, data, settings, 10_000, wide.memory - 1)
    assert (again.micro_batch, again.remat) == (16, True) and again.memory < wide.memory
    small = plan(session, data, settings, 10_000, again.memory - 1)
    assert small.micro_batch < 16 and small.memory < again.memory
    kept = plan(session, data, Settings(batch_size=16, remat=False), 10_000, again.memory - 1)
    assert kept.micro_batch < 16 and not kept.remat
    with pytest.raises(OnDeviceError, match="Training needs about"):
        plan(session, data, settings, 10_000, 1_000_000)


def test_moments_in_eight_bits_are_planned(session, data):
    """Few examples, many parameters: then the update is what memory goes into. Old and new moments: 16 bytes, or 4."""
    wide, lean = (plan(session, data, Settings(optimizer=o), 10**9, 10**12).memory for o in ("adamw", "adamw8bit"))
    assert wide - lean == 12 * 10**9


def test_eight_bits_learn_as_well(session, data):
    def run(optimizer):
        settings = Settings(steps=30, rank=128, learning_rate=5e-3, optimizer=optimizer)
        return [e.loss for e in train(session, data, settings) if isinstance(e, StepDone)]

    whole, packed = run("adamw"), run("adamw8bit")
    assert whole != packed and whole[-1] < 0.6 * whole[0]
    assert packed[-1] == pytest.approx(whole[-1], rel=0.1)


@pytest.mark.parametrize("lean", [{"remat": True}, {"micro_batch": 1}, {"micro_batch": 3, "remat": True}])
def test_lean_is_the_same(session, data, lean):
    """Rows of several lengths: each target counts the same in whatever batch it stands."""

    def run(**more):
        settings = Settings(steps=4, batch_size=4, accumulate=2, dropout=0.0, learning_rate=1e-2, **more)
        return [(e.loss, e.gradient_norm) for e in train(session, data, settings) if isinstance(e, StepDone)]

    for (loss, norm), (lean_loss, lean_norm) in zip(run(micro_batch=8, remat=False), run(**lean), strict=True):
        assert lean_loss == pytest.approx(loss, abs=2e-5)
        assert lean_norm == pytest.approx(norm, rel=2e-4)


def test_dropout_is_the_same_when_computed_twice(session, data):
    def run(remat):
        settings = Settings(steps=4, dropout=0.5, learning_rate=1e-2, remat=remat)
        return [e.loss for e in train(session, data, settings) if isinstance(e, StepDone)]

    assert run(True) == pytest.approx(run(False), abs=1e-6)
