"""shrink: the best of several plans within a size, with a report; bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from ondevice.cli import main
from ondevice.errors import BadOption, OnDeviceError
from ondevice.runtime.session import open_session
from ondevice.tools.quantize import running as rounding
from ondevice.tools.quantize.matrices import numbers
from ondevice.tools.shrink import Options, Outcome, Result, plans, running, shrink, trial
from ondevice.tools.shrink.plans import Plan, cuts, together
from ondevice.tools.shrink.report import frontier
from ondevice.tools.shrink.running import Clock
from tests.tools.wide_models import LLAMA, write_model


@pytest.fixture
def text(tmp_path):
    draw = np.random.default_rng(1)
    words = ["the", "and", "hand", "on", "in", "cold", "day", "other", "that", "thin"]
    path = tmp_path / "text.txt"
    path.write_text(" ".join(draw.choice(words, 600)))
    return path


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "DEEP", 3)
    return write_model(tmp_path / "in", LLAMA | {"num_hidden_layers": 3, "intermediate_size": 320})


def outcome(plan, nbytes, loss):
    return Outcome(plan, nbytes, 1, loss, 1.0, 1.0)


@pytest.mark.parametrize(("deep", "cut"), [(3, "layers -1"), (4, "channels -10%")])
def test_the_best_plan_becomes_the_folder(tmp_path, model, text, monkeypatch, deep, cut):
    monkeypatch.setattr(plans, "DEEP", deep)
    monkeypatch.setattr(running, "WORSE", 1e9)  # a random model loses little by anything: all plans are carried out
    part = Plan(layers=1) if deep == 3 else Plan(channels=0.1)
    monkeypatch.setattr(running, "_worth_healing", lambda trial: part if len(trial.outcomes) == 2 else None)
    target = 90_000
    *_, result = shrink(model, tmp_path / "out", Options(target, calibration=text, tokens=512, length=32))
    made = [o for o in result.outcomes if not o.failed]
    assert isinstance(result, Result) and not result.left and not result.hurried
    assert all(o.nbytes <= target for o in made)
    best = min(made, key=lambda o: o.loss)
    assert result.chosen == best.plan
    assert [o.plan for o in result.outcomes] == ["bits alone", cut, f"{cut}, healed"]
    assert [o.expected is None for o in result.outcomes] == [True, False, True]
    assert [o.plan for o in result.cuts] == [cut] and not result.cuts[0].failed
    with open_session(tmp_path / "out", backend="reference") as session:
        assert session.checkpoint.nbytes == best.nbytes
        assert session.tokenizer.decode(session.tokenizer.encode("the day")) == "the day"
    report = (tmp_path / "out" / "REPORT.md").read_text()
    assert all(o.plan in report for o in result.outcomes) and f"**{best.plan}**" in report
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "text.txt"}


def test_killed_it_goes_on_where_it_was(tmp_path, model, text, monkeypatch):
    """What was found out is not found out again, and the time it took counts."""
    options = Options(90_000, calibration=text, tokens=512, length=32)
    for event in shrink(model, tmp_path / "out", options):
        assert isinstance(event, Outcome) and event.loss is not None
        break
    assert (tmp_path / ".out.shrink" / "best" / "config.json").exists() and not (tmp_path / "out").exists()
    monkeypatch.setattr("ondevice.tools.shrink.trial.weigh", None)
    monkeypatch.setattr("ondevice.tools.shrink.trial.samples", None)
    *_, result = shrink(model, tmp_path / "out", replace(options, minutes=1e-4))
    assert result.outcomes == (event,) and result.left and result.seconds > event.seconds
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "text.txt"}


@pytest.mark.parametrize("calibrated", [True, False])
def test_without_time_there_is_a_model_of_nearest_values(tmp_path, model, text, calibrated):
    options = Options(90_000, 1e-4, calibration=text if calibrated else None, tokens=512, length=32)
    *_, result = shrink(model, tmp_path / "out", options)
    assert [o.plan for o in result.outcomes] == [result.chosen] == [trial.HURRIED] and result.left
    with open_session(tmp_path / "out", backend="reference") as session:
        assert 60_000 < session.checkpoint.nbytes == result.outcomes[0].nbytes <= 90_000
    assert "Time was up" in (tmp_path / "out" / "REPORT.md").read_text()
    assert "not measured" in (tmp_path / "out" / "REPORT.md").read_text()
    assert not (tmp_path / "out" / "report.png").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "text.txt"}


def test_a_slow_model_writes_less_to_calibrate_on(tmp_path, model, monkeypatch):
    """What it takes to write all of it would leave no time for anything else."""
    clocks, done = [], []
    monkeypatch.setattr(running, "Clock", lambda *given: clocks.append(Clock(*given)) or clocks[0])

    def told(event):
        if event.stage.startswith("The model writes"):
            done.append(event.done)
            clocks[0].before = clocks[0].limit * running.SAMPLING

    *_, result = shrink(model, tmp_path / "out", Options(90_000, 10.0, tokens=8 * 96, length=96), told)
    assert done[-1] == 8 * 64 and not result.hurried


@pytest.mark.parametrize(("stage", "plan"), [("Rounding", trial.HURRIED), ("What each layer does", "bits alone")])
def test_when_time_is_up_what_is_under_way_is_dropped(tmp_path, model, text, monkeypatch, stage, plan):
    """In the middle of the first plan, and of what comes after it."""
    clocks, hurried = [], []
    monkeypatch.setattr(running, "Clock", lambda *given: clocks.append(Clock(*given)) or clocks[0])
    monkeypatch.setattr(rounding, "numbers", lambda _, name: hurried.append(name) or numbers(_, name))

    def told(event):
        if event.stage.startswith(stage) and event.done > 1:
            clocks[0].before = 1e9

    options = Options(90_000, calibration=text, tokens=512, length=32)
    *_, result = shrink(model, tmp_path / "out", options, told)
    assert result.chosen == plan and len(result.outcomes) == 1 and result.seconds > 1e9
    if stage == "Rounding":  # what was finished is not done again
        assert hurried and not any(name.startswith("layers.0.") for name in hurried)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "text.txt"}


def test_a_size_that_no_plan_reaches(tmp_path, model, text):
    with pytest.raises(BadOption, match="2 bits for every matrix take"):
        list(shrink(model, tmp_path / "out", Options(5_000, calibration=text, tokens=512, length=32)))
    assert {path.name for path in tmp_path.iterdir()} == {"in", "text.txt"}


def test_what_is_quantized_is_taken_when_asked(tmp_path, model, text, quantize_folder):
    source = quantize_folder(model, tmp_path / "in8", {"": (8, 32)})
    options = Options(90_000, 1e-4, calibration=text, tokens=512, length=32)
    with pytest.raises(BadOption, match="quantized already"):
        list(shrink(source, tmp_path / "out", options))
    *_, result = shrink(source, tmp_path / "out", replace(options, requantize=True))
    assert result.outcomes[0].nbytes <= 90_000
    assert {path.name for path in tmp_path.iterdir()} == {"in", "in8", "out", "text.txt"}


def test_an_existing_folder_is_left_alone(tmp_path, model, text):
    (tmp_path / "out").mkdir()
    with pytest.raises(OnDeviceError, match="exists already"):
        list(shrink(model, tmp_path / "out", Options(90_000, calibration=text)))


def test_few_bits_bring_smaller_models_into_question(model):
    with open_session(model, backend="reference") as session:
        many, few = cuts(session.config, 10**6), cuts(session.config, 10**5)
    assert not many and [plan.name for plan in few] == ["layers -1"]
    both = [plan.name for plan in together([Plan(vocabulary=2), *few])]
    assert both == ["bits alone", "layers -1", "vocabulary / 2", "vocabulary / 2, layers -1"]


def test_healing_is_for_what_may_win_by_it():
    tried = [outcome("bits alone", 1, 0.3), outcome("layers -1", 1, 0.32)]
    for lost, expected in ((0.1, Plan(layers=1)), (0.02, None)):
        trial = SimpleNamespace(outcomes=tried, losses={Plan(layers=1): lost})
        assert running._worth_healing(trial) == expected
    trial.outcomes = [*tried, outcome("layers -1, healed", 1, 0.31)]
    assert running._worth_healing(trial) is None


def test_the_frontier_is_what_nothing_smaller_beats():
    points = [outcome("a", 30, 0.3), outcome("b", 20, 0.5), outcome("c", 25, 0.6), outcome("d", 40, 0.3)]
    assert [o.plan for o in frontier(points)] == ["b", "a"]


def test_the_command(tmp_path, model, text, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["shrink", str(model), str(tmp_path / "out"), "--target-size", "90kB", "--calibration", str(text),
              "--tokens", "512", "--budget", "0.001", "--json"])  # fmt: skip
    assert stop.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["chosen"] == trial.HURRIED and told["hurried"]
    with pytest.raises(SystemExit) as stop:
        main(["shrink", str(model), str(tmp_path / "no"), "--target-size", "big"])
    assert stop.value.code == 2
    assert "is no size" in capsys.readouterr().err
