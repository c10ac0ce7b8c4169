"""quantize --method distill: scales and biases learn from the original, codes stay; other ways to train them."""

from __future__ import annotations

import numpy as np
import pytest

from ondevice.backends.base import Step
from ondevice.errors import BadOption, OnDeviceError
from ondevice.runtime.session import open_session
from ondevice.schemes import to_float
from ondevice.tensors import Affine
from ondevice.tools import teaching
from ondevice.tools.quantize import Options, quantize
from ondevice.train.methods import Scales
from tests.tools.wide_models import LLAMA, MOE, parameters, write_model

PROSE = "the end and the other hand in the band, on the one hand and then there is the sand. " * 40


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_text(PROSE)
    return path


@pytest.mark.parametrize("hf", [LLAMA, MOE], ids=["tied", "experts"])
def test_scales_learn_and_codes_stay(tmp_path, prose, hf):
    source = write_model(tmp_path / "in", hf)
    common = {"bits": 3, "group_size": 32, "calibration": prose, "length": 24}
    quantize(source, tmp_path / "rtn", Options(method="rtn", **common))
    told = []
    options = Options(method="distill", start="rtn", steps=12, **common)
    result = quantize(source, tmp_path / "out", options, told.append)
    assert result.taught.after.kl < 0.9 * result.taught.before.kl
    assert any(event.stage.startswith("Learning") for event in told)
    before, after = parameters(tmp_path / "rtn"), parameters(tmp_path / "out")
    for name in before:
        assert after[name].format == before[name].format
        assert np.array_equal(after[name].parts["weight"], before[name].parts["weight"])
    moved = [n for n in before if isinstance(before[n].format, Affine) and differ(before[n], after[n], "scales")]
    assert len(moved) == sum(isinstance(before[n].format, Affine) for n in before)
    assert not list(tmp_path.glob(".*"))


def test_the_less_there_is_to_learn_the_shorter_are_the_steps(tmp_path, prose, monkeypatch):
    source, rates, taught = write_model(tmp_path / "in"), [], teaching.taught

    def noting(student, data, settings, *more):
        rates.append(settings.learning_rate)
        return taught(student, data, settings, *more)

    monkeypatch.setattr(teaching, "taught", noting)
    common = {"group_size": 32, "start": "rtn", "steps": 8, "calibration": prose, "length": 24}
    few, many = (quantize(source, tmp_path / str(b), Options("distill", b, **common)).taught for b in (3, 6))
    assert few.after.kl < few.before.kl and many.after.kl <= many.before.kl
    assert rates[0] / rates[1] == pytest.approx((few.before.kl / many.before.kl) ** 0.5) and rates[0] > 5 * rates[1]


def test_what_was_interrupted_goes_on(tmp_path, prose):
    source, seen = write_model(tmp_path / "in"), []
    options = Options(method="distill", start="rtn", steps=6, calibration=prose, length=24, group_size=32)
    quantize(source, tmp_path / "whole", options)

    def stopped(event):
        if event.stage.startswith("Learning") and event.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", options, stopped)
    quantize(source, tmp_path / "out", options, seen.append)
    assert [event.done for event in seen if event.stage.startswith("Learning")] == [5, 6]
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def differ(one, other, part):
    return not np.array_equal(one.parts[part], other.parts[part])


def test_untrained_scales_are_the_model(tmp_path):
    source = write_model(tmp_path / "in")
    quantize(source, tmp_path / "q", Options(method="rtn", bits=4, group_size=32))
    ids = np.arange(12, dtype=np.int32)[None]
    with open_session(tmp_path / "q", backend="reference") as session:
        ops, method = session.backend, Scales(session)
        begin = method.initial()
        scope = method.scope({name: ops.array(values) for name, values in begin.items()}, None)
        hidden = session.decoder.hidden(ops.array(ids), Step.whole(*ids.shape))
        logits = [ops.numpy(session.decoder.head(p, hidden)) for p in (session.decoder.scope(), scope)]
        assert np.abs(logits[0] - logits[1]).max() < 1e-5
        drawn = {n: np.random.default_rng(1).normal(size=v.shape).astype(np.float32) * 0.1 for n, v in begin.items()}
        scope = method.scope({name: ops.array(values) for name, values in drawn.items()}, None)
        made = method.trained("embed", drawn)
        assert np.abs(ops.numpy(scope.trainable["embed"]) - to_float(made)).max() < 0.02


def test_what_is_asked_of_distilling(tmp_path, prose):
    with pytest.raises(BadOption, match="cannot start with 'distill'"):
        Options(method="distill", start="distill")
    with pytest.raises(BadOption, match="rtn takes --bits, not a target"):
        Options(method="distill", start="rtn", target_bytes=1)
    source, short = write_model(tmp_path / "in"), tmp_path / "short.txt"
    short.write_text("the end and the other hand in the band, on the one hand")
    with pytest.raises(OnDeviceError, match="to learn from"):
        quantize(source, tmp_path / "out", Options(method="distill", start="rtn", calibration=short, length=24))
    assert not (tmp_path / "out").exists()
    with pytest.raises(OnDeviceError, match="no scales to train"), open_session(source, backend="cpu") as session:
        Scales(session)
