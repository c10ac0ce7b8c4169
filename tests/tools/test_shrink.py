"""shrink: the best of several plans within a size, with a report; bad input."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from math import inf
from types import SimpleNamespace

import numpy as np
import pytest

from ondevice.cli import main
from ondevice.errors import BadOption, OnDeviceError
from ondevice.runtime.session import open_session
from ondevice.tools.quantize import distilling
from ondevice.tools.quantize import running as rounding
from ondevice.tools.quantize.matrices import numbers
from ondevice.tools.shrink import Options, Outcome, Result, foretelling, plans, running, shrink, trial
from ondevice.tools.shrink.plans import Plan, cuts, together
from ondevice.tools.shrink.report import frontier
from ondevice.tools.shrink.running import Clock
from ondevice.tools.work import Work
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


def soon():
    return time.perf_counter() + 600


def outcome(plan, nbytes, loss):
    return Outcome(plan, nbytes, 1, loss, 1.0, 1.0)


@pytest.mark.parametrize(("deep", "cut"), [(3, "layers -1"), (4, "channels -10%")])
def test_the_best_plan_becomes_the_folder(tmp_path, model, text, monkeypatch, deep, cut):
    monkeypatch.setattr(plans, "DEEP", deep)
    monkeypatch.setattr(running, "WORSE", 1e9)  # a random model loses little by anything: all plans are carried out
    monkeypatch.setattr(foretelling, "_won", lambda trial, plan, rounded: 9.0)
    target = 90_000
    *_, result = shrink(model, tmp_path / "out", Options(target, calibration=text, tokens=512, length=32))
    made = [o for o in result.outcomes if not o.failed]
    assert isinstance(result, Result) and not result.left and not result.hurried
    assert all(o.nbytes <= target for o in made)
    best = min(made, key=lambda o: o.loss)
    assert result.chosen == best.plan
    plans_made = [o.plan for o in result.outcomes]
    assert plans_made[0] == "bits alone" and sorted(plans_made) == sorted(
        f"{plan}{how}" for plan in ("bits alone", cut) for how in ("", ", healed")
    )
    assert [o.expected is None for o in result.outcomes] == [True, False, False, False]
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


def test_what_a_kill_left_half_way_is_in_nobodys_way(tmp_path, model, text):
    options = Options(90_000, calibration=text, tokens=512, length=32)
    with trial.Trial(model, Work(tmp_path / "out", {}, "shrink"), options, lambda event: None) as made:
        made.prepare()
        (made.work.path / "made").mkdir()
        assert not made.run(Plan()).failed
        (made.work.path / "made").mkdir()
        assert not made.run(Plan(healed=True)).failed


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

    monkeypatch.setattr(running, "_next", lambda trial, clock: None)
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


@pytest.mark.parametrize("target", [5_000, 30_000])
def test_a_size_that_no_plan_reaches(tmp_path, model, text, target):
    with pytest.raises(BadOption, match="2 bits for every matrix take"):
        list(shrink(model, tmp_path / "out", Options(target, calibration=text, tokens=512, length=32)))
    assert {path.name for path in tmp_path.iterdir()} == {"in", "text.txt"}


def test_what_can_be_said_at_once_is(tmp_path, model, text, monkeypatch):
    monkeypatch.setattr(trial.Trial, "_samples", None)
    for target, message in [(5_000, "No plan takes 0.01 MB or less"), (10**9, "which is no more than 1000.00 MB")]:
        with pytest.raises(BadOption, match=message):
            list(shrink(model, tmp_path / "out", Options(target, calibration=text, tokens=512, length=32)))
    for minutes in (0, -1, float("nan"), inf):
        with pytest.raises(BadOption, match="no time to work in"):
            Options(90_000, minutes)


def test_a_folder_that_came_in_between_costs_nothing(tmp_path, model, text):
    options = Options(90_000, calibration=text, tokens=512, length=32)
    with pytest.raises(OnDeviceError, match="out could not be made: "):
        for outcome in shrink(model, tmp_path / "out", options):
            (tmp_path / "out" / outcome.plan).mkdir(parents=True, exist_ok=True)
    (tmp_path / "out").rename(tmp_path / "else")
    *again, result = shrink(model, tmp_path / "out", options)
    assert not again and result.path == tmp_path / "out" and (result.path / "REPORT.md").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "else", "text.txt"}


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


@pytest.mark.parametrize("points", [[(0.378, 1.11)], [(0.378, 1.11), (0.036, 0.074)], [(0.169, 0.37)]])
def test_rounding_loses_by_a_law_that_measured_plans_fit(points):
    """What SmolLM2 loses at 50, 60 and 76 MB, from some of these."""
    law = foretelling.Law(points)
    for estimate, lost in [(0.378, 1.11), (0.169, 0.37)]:
        assert law(estimate) == pytest.approx(lost, rel=0.08)
    for estimate, lost in points:
        assert law(estimate) == pytest.approx(lost)
    assert foretelling.Law([])(0.2) == 0.2


BITS, TOKENS, LAYERS = Plan(), Plan(vocabulary=3), Plan(layers=2)
ESTIMATES = {BITS: 0.378, TOKENS: 0.19, LAYERS: 0.31, Plan(3, 2): 0.15}


def tried(*outcomes):
    """What the real model was seen to lose by cutting and rounding, at 50 MB."""
    shared = {plan: SimpleNamespace(cost=cost, nbytes=1) for plan, cost in ESTIMATES.items()}
    return SimpleNamespace(
        outcomes=[Outcome(plan, 1, 1, loss, 1.0, 60.0) for plan, loss in outcomes], losses={TOKENS: 0.42, LAYERS: 0.26},
        shared=shared.__getitem__, options=SimpleNamespace(target_bytes=1, calibration="text.txt"), weighed=True,
    )  # fmt: skip


def test_what_is_measured_corrects_what_is_foretold():
    before = {f.plan: f.loss for f in foretelling.foretold(tried(("bits alone", 1.11)))}
    assert next(iter(before)).healed and BITS not in before
    assert before[replace(BITS, healed=True)] == pytest.approx(0.7 * 1.11)
    assert before[TOKENS] == pytest.approx(0.42 + 0.454, abs=2e-3)
    after = {f.plan: f.loss for f in foretelling.foretold(tried(("bits alone", 1.11), (TOKENS.name, 1.02)))}
    assert TOKENS not in after
    assert after[replace(TOKENS, healed=True)] == pytest.approx(1.02 - 0.7 * 0.42)
    nearest = (1.02 - 0.42) * (0.15 / 0.19) ** foretelling.POWER  # what rounding lost where bits are most alike
    assert before[Plan(3, 2)] + 0.1 < after[Plan(3, 2)] == pytest.approx(0.42 + 0.26 + nearest)
    assert after[LAYERS] == before[LAYERS]
    assert sorted(after.values()) == list(after.values())
    alone = tried(("bits alone", 1.11), (TOKENS.name, 1.02))
    alone.options.calibration = None  # the original writes the text, which takes time and teaches less
    own = {f.plan: f.loss for f in foretelling.foretold(alone)}
    assert 1.02 > own[replace(TOKENS, healed=True)] > after[replace(TOKENS, healed=True)] + 0.1


def test_healing_comes_after_its_plan_without_and_only_where_it_may_win(tmp_path):
    clock = Clock(Work(tmp_path / "out", {}, "shrink"), 1800.0)
    found = running._next(tried(("bits alone", 1.11)), clock)
    assert found.plan.parts and not found.plan.healed
    found = running._next(tried(("bits alone", 1.11), (TOKENS.name, 0.85)), clock)
    assert found.plan == replace(TOKENS, healed=True)
    clock.before = 1800 - 0.15 * 1800 - 90.0  # time for one healing, not for anything before it
    assert running._next(tried(("bits alone", 1.11)), clock).plan.healed
    clock.before = 1700.0
    assert not running._next(tried(("bits alone", 1.11)), clock).plan.healed
    clock.before = 1790.0
    assert running._next(tried(("bits alone", 1.11)), clock) is None
    clock.before = 0.0
    assert running._next(tried(("bits alone", 0.04)), clock) is None


def test_all_of_a_text_but_what_judges_is_learnt_from(tmp_path, model, text):
    work = Work(tmp_path / "out", {}, "shrink")
    with trial.Trial(model, work, Options(90_000, calibration=text, tokens=256, length=32), lambda event: None) as made:
        made.prepare()
        whole = made.subject.tokenizer.encode(text.read_text())
        learnt = made._said(made.lessons)
        assert len(made.subject.tokenizer.encode(learnt)) > 192 and made.judge.tokens == 64
        assert len(learnt) > 0.7 * len(text.read_text()) and text.read_text().startswith(learnt)
        at = int(0.75 * (len(whole) // 32)) * 32
        assert np.array_equal(made.subject.counted.reshape(-1), whole[:at])
        cut = np.array(whole[:at]).reshape(-1, 32).tolist()
        assert made.ids.shape == (6 + 3, 32) and all(row in cut for row in made.ids[:6].tolist())
        assert not any(row in cut for row in made.ids[6:].tolist())  # its own words
        held = whole[at : len(whole) // 32 * 32]
        assert made.judge.text == made.subject.tokenizer.decode(held[:32] + held[-32:])


def test_what_is_learnt_from_is_a_text_and_between_it_what_the_model_says(tmp_path, model, text):
    work = Work(tmp_path / "out", {}, "shrink")
    with trial.Trial(model, work, Options(90_000, calibration=text, tokens=256, length=32), lambda event: None) as made:
        made.prepare()
        began = made.work.arrays("samples")["calibration"][6:].tolist()
        lessons = made._lessons(soon())
        assert lessons.given and lessons.length == 32
        learnt = lessons.data.read_text()
        own = made.work.arrays("own words")["ids"]
        assert own.size >= trial.OWN * made.lessons.size and not any(row in began for row in own.tolist())
        found, at = [], 0
        for part in [made._said(row) for row in made.lessons]:
            found.append(at := learnt.index(part, at))
            at += len(part)
        between = np.diff([*found, len(learnt)]) - [len(made._said(row)) for row in made.lessons]
        assert sum(between > 0) > 0.4 * len(between) and max(between) < 0.2 * sum(between)
        assert all(made._said(row) in learnt for row in own)


def test_without_a_text_it_learns_by_what_the_model_says_alone(tmp_path, model, monkeypatch):
    monkeypatch.setattr(trial, "WRITTEN", 256)
    work = Work(tmp_path / "out", {}, "shrink")
    with trial.Trial(model, work, Options(90_000, tokens=256, length=32), lambda event: None) as made:
        made.prepare()
        lessons = made._lessons(soon())
        assert not lessons.given and made.work.arrays("own words")["ids"].size >= 256
        learnt = lessons.data.read_text()
        assert all(made._said(row) in learnt for row in (*made.lessons, *made.work.arrays("own words")["ids"]))


def test_scales_of_bits_alone_are_taught_once_all_is_rounded(tmp_path, model, text, monkeypatch):
    """They are not rounded once more."""
    after = {}
    monkeypatch.setattr(distilling, "_rate", lambda before: 0.01)
    with trial.Trial(
        model,
        Work(tmp_path / "out", {}, "shrink"),
        Options(90_000, calibration=text, tokens=512, length=32),
        lambda e: None,
    ) as made:
        made.prepare()
        made.run(Plan())
        before, learnt = tensors(made.best), replace(made._lessons(soon()), steps=8, minutes=5.0)
        monkeypatch.setattr(made, "_lessons", lambda ends: learnt)
        monkeypatch.setattr(trial, "quantize", None)
        monkeypatch.setattr(made, "_keep", lambda folder, outcome: after.update(tensors(folder)))
        assert not made.run(Plan(healed=True)).failed
    names = [name for name, tensor in before.items() if "scales" in tensor.parts]
    assert names and before.keys() == after.keys()
    assert all(np.array_equal(before[name].parts["weight"], after[name].parts["weight"]) for name in names)
    assert any(not np.array_equal(before[name].parts["scales"], after[name].parts["scales"]) for name in names)


def tensors(folder):
    with open_session(folder, backend="reference") as session:
        return {name: session.parameters[name] for name in session.parameters}


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
