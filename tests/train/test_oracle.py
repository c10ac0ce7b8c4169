"""Losses of the first steps against peft's, on every backend that is here; and of the real model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ondevice.registry import probe_backends
from ondevice.runtime.session import open_session
from ondevice.train import Settings, StepDone, load_data, train
from ondevice.train.methods import make_method

from .oracle import peft_losses

BACKENDS = ("reference", "cpu", "cuda", "mlx")
TOLERANCE = 1e-3


def stirred(session, settings: Settings) -> dict[str, np.ndarray]:
    """A beginning in which neither factor is zero, so that both learn from the first step on."""
    draw = np.random.default_rng(0)
    begin = make_method(session, settings).initial()
    return {
        name: values + 0.02 * draw.standard_normal(values.shape, np.float32) if "magnitude" not in name else values
        for name, values in begin.items()
    }


def losses(events) -> list[float]:
    return [e.loss for e in events if isinstance(e, StepDone)]


def compare(model: Path, data_file: Path, tmp_path: Path, backend: str, settings: Settings) -> None:
    pytest.importorskip("peft")
    with open_session(model, backend=backend, exact=True) as session:
        data = load_data(data_file, session, 64, validation=0)
        begin = stirred(session, settings)
        list(train(session, data, Settings(**settings.as_dict() | {"steps": 0}), tmp_path / "begin", initial=begin))
        ours = losses(train(session, data, settings, initial=begin))
    theirs = list(peft_losses(model, tmp_path / "begin", data, settings))
    assert len(ours) == settings.steps
    assert ours[-1] < 0.9 * ours[0], "nothing was learnt: the comparison would say little"
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_losses_of_peft(tiny, data_file, tmp_path, backend):
    if not probe_backends()[backend].ready:
        pytest.skip(f"{backend} is not here")
    compare(tiny, data_file, tmp_path, backend, Settings(steps=20, learning_rate=5e-3, rank=4))


@pytest.mark.parametrize("method", ["rslora", "dora"])
def test_the_losses_of_other_methods(tiny, data_file, tmp_path, method):
    settings = Settings(steps=20, learning_rate=5e-3, rank=4, method=method, targets=("q_proj:3", "down_proj:5:7"))
    compare(tiny, data_file, tmp_path, "cpu", settings)


def test_all_weights_against_transformers(tiny, data_file):
    settings = Settings(steps=20, learning_rate=1e-3, method="full", clip=0.5)
    with open_session(tiny, backend="cpu", exact=True) as session:
        data = load_data(data_file, session, 64, validation=0)
        ours = losses(train(session, data, settings))
    pytest.importorskip("transformers")
    theirs = list(peft_losses(tiny, None, data, settings))
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)
