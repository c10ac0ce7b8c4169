"""A run that is killed anywhere and goes on ends in the same bytes; a changed one is refused, by name."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from ondevice.errors import OnDeviceError
from ondevice.train import Finished, Saved, Saving, Settings, Started, StepDone, Validating, load_data, train

from .conftest import sums, write_lines

STEPS = 40
OPTIONS = [
    "--steps", str(STEPS), "--rank", "3", "--dropout", "0.1", "--accumulate", "2", "--validate-every", "7",
    "--learning-rate", "5e-3", "--backend", "cpu", "--save-every", "5",
]  # fmt: skip


def started(model: Path, data: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "ondevice", "lora-train", str(model), str(data), "--out", str(out), "--resume"]
    return subprocess.Popen([*command, *OPTIONS], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kept(out: Path) -> tuple[bytes, list]:
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    told = [(m["step"], m["loss"], m.get("validation_loss")) for m in steps]
    return (out / "adapter_model.safetensors").read_bytes(), told


def killed(model: Path, data: Path, tmp_path: Path, times: int) -> None:
    whole = tmp_path / "whole"
    began = time.monotonic()
    assert started(model, data, whole).wait(120) == 0
    lasts = time.monotonic() - began
    draw = random.Random(times)
    out, kills = tmp_path / "killed", 0
    while kills < times:
        run = started(model, data, out)
        time.sleep(draw.uniform(0.3, 0.9) * lasts)
        if run.poll() is not None:  # it had ended before: begin another
            assert run.returncode == 0, run.stderr.read()
            assert kept(out) == kept(whole)
            out = tmp_path / f"killed{kills}"
            continue
        run.send_signal(signal.SIGKILL)
        run.wait()
        kills += 1
    last = started(model, data, out)
    assert last.wait(120) == 0, last.stderr.read()
    assert kept(out) == kept(whole)
    assert sorted(p.name for p in out.iterdir() if p.name != "curves.png") == [
        "adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "training.json",
    ]  # fmt: skip


def test_killed_and_gone_on(tiny, data_file, tmp_path):
    killed(tiny, data_file, tmp_path, 2)


@pytest.mark.slow
def test_killed_twenty_times(tiny, data_file, tmp_path):
    killed(tiny, data_file, tmp_path, 20)


def test_ctrl_c_leaves_a_checkpoint(tiny, data_file, tmp_path):
    run = started(tiny, data_file, tmp_path / "out")
    while not run.stderr.readline().startswith("step"):
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130
    said = run.stderr.read()
    assert "--resume goes on from there" in said and "Traceback" not in said
    assert (tmp_path / "out" / "checkpoint.safetensors").is_file()


SETTINGS = Settings(steps=8, batch_size=3, dropout=0.2, rank=2)
WIDE = Settings(steps=8, batch_size=3, rank=128, optimizer="adamw8bit")  # so wide that moments are kept in eight bits


def interrupted(session, data, dest, settings=SETTINGS, behind=5):
    """A run that is given up behind a step, after a checkpoint at an earlier one."""
    for event in train(session, data, settings, dest, saving=Saving(steps=3)):
        if isinstance(event, StepDone) and event.step == behind:
            break


@pytest.fixture
def data(session, data_file):
    return load_data(data_file, session, 64)


def goes_on(session, data, dest, settings):
    interrupted(session, data, dest, settings)
    events = list(train(session, data, settings, dest, resume=True))
    assert [e.step for e in events if isinstance(e, StepDone)] == [6, 7, 8]
    whole = list(train(session, data, settings))
    ours, theirs = events[-1].parameters, whole[-1].parameters
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_goes_on_where_it_was(session, data, tmp_path):
    goes_on(session, data, tmp_path / "out", SETTINGS)


def test_moments_in_eight_bits_are_kept(session, data, tmp_path):
    goes_on(session, data, tmp_path / "out", WIDE)
    interrupted(session, data, tmp_path / "again", WIDE)
    kept = load_file(tmp_path / "again" / "checkpoint.safetensors")
    moments = {name: a for name, a in kept.items() if name.startswith("moment:layers.0.attn.q.lora_down")}
    assert sum(a.nbytes for a in moments.values()) < 2.1 * kept["param:layers.0.attn.q.lora_down"].size


def test_given_up_while_validating(session, data, tmp_path):
    """The step whose validation was cut short is made again."""
    for event in train(session, data, SETTINGS, tmp_path / "out"):
        if isinstance(event, Validating) and len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 4:
            break
    events = list(train(session, data, SETTINGS, tmp_path / "out", resume=True))
    assert [e.step for e in events if isinstance(e, StepDone)] == [5, 6, 7, 8]
    told = [e.validation_loss for e in train(session, data, SETTINGS) if isinstance(e, StepDone)]
    steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [m["validation_loss"] for m in steps] == told


@pytest.mark.parametrize("backend", ["cuda", "mlx"])
def test_goes_on_elsewhere(tiny, data_file, tmp_path, backend):
    from ondevice.registry import probe_backends
    from ondevice.runtime.session import open_session

    if not probe_backends()[backend].ready:
        pytest.skip(f"{backend} is not here")
    with open_session(tiny, backend=backend) as session:
        data = load_data(data_file, session, 64)
        goes_on(session, data, tmp_path / "out", SETTINGS)
        goes_on(session, data, tmp_path / "packed", WIDE)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"rank": 4}, "rank was 2, is 4"), ({"seed": 1}, "seed was 0, is 1"), ({"steps": 9}, "steps was 8, is 9")],
)
def test_changed_settings_are_named(session, data, tmp_path, change, named):
    interrupted(session, data, tmp_path / "out")
    with pytest.raises(OnDeviceError, match=named):
        list(train(session, data, Settings(**SETTINGS.as_dict() | change), tmp_path / "out", resume=True))
    assert (tmp_path / "out" / "checkpoint.safetensors").is_file()


def test_changed_data_is_named(session, data, tmp_path):
    interrupted(session, data, tmp_path / "out")
    other = load_data(write_lines(tmp_path / "other.jsonl", sums(5)), session, 64)
    with pytest.raises(OnDeviceError, match="data has changed"):
        list(train(session, other, SETTINGS, tmp_path / "out", resume=True))


def test_a_changed_base_is_named(session, data, tiny, tmp_path):
    import shutil

    from ondevice.runtime.session import open_session

    interrupted(session, data, tmp_path / "out")
    copy = shutil.copytree(tiny, tmp_path / "copy")
    raw = bytearray((copy / "model.safetensors").read_bytes())
    raw[-4:] = b"\x00\x00\x80\x3f" if raw[-4:] != b"\x00\x00\x80\x3f" else b"\x00\x00\x00\x3f"
    (copy / "model.safetensors").write_bytes(raw)
    with open_session(copy, backend="cpu", exact=True) as other, pytest.raises(OnDeviceError, match="base has changed"):
        list(train(other, data, SETTINGS, tmp_path / "out", resume=True))


def test_a_used_place_is_refused(session, data, tmp_path):
    interrupted(session, data, tmp_path / "out")
    with pytest.raises(OnDeviceError, match="was interrupted"):
        list(train(session, data, SETTINGS, tmp_path / "out"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(OnDeviceError, match="exists already"):
            list(train(session, data, SETTINGS, tmp_path / "other", resume=resume))


def test_two_runs_do_not_share_a_place(session, data, tmp_path):
    first = train(session, data, SETTINGS, tmp_path / "out")
    next(first)
    with pytest.raises(OnDeviceError, match="is in use"):
        list(train(session, data, SETTINGS, tmp_path / "out", resume=True))
    assert list(first)[-1].step == 8


def test_a_full_disk_keeps_the_checkpoint_before(session, data, tmp_path, monkeypatch):
    from ondevice.train import state

    run = train(session, data, SETTINGS, tmp_path / "out", saving=Saving(steps=3))
    assert any(isinstance(event, Saved) for event in run)
    run = train(session, data, SETTINGS, tmp_path / "full", saving=Saving(steps=2))
    saved = next(event for event in run if isinstance(event, Saved))
    before = saved.path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state.os, "fsync", full)
    with pytest.raises(OnDeviceError, match="No space left") as told:
        list(run)
    assert "--resume" in told.value.hint
    assert saved.path.read_bytes() == before
    assert not [p for p in (tmp_path / "full").iterdir() if p.name.endswith(".partial")]


class Killed(BaseException):
    """Nothing is cleaned up behind it."""


def test_what_a_kill_leaves_of_a_checkpoint_goes_in_the_end(session, data, tmp_path, monkeypatch):
    """The library writes into a file of its own, beside the one that is asked for."""
    from ondevice.train import state

    def half_written(tensors, path, metadata):
        (path.parent / ".tmpAbC123").write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(state, "save_file", half_written)
        list(train(session, data, SETTINGS, tmp_path / "out", saving=Saving(steps=2)))
    list(train(session, data, SETTINGS, tmp_path / "out", resume=True))
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_what_a_kill_leaves_of_an_ended_run_goes_when_it_is_asked_for_again(session, data, tmp_path, monkeypatch):
    """Killed when all was written but the checkpoint stood there still, and later, while the curves were drawn."""
    from ondevice.train import folder

    def killed(_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(folder, "clear", killed)
        list(train(session, data, SETTINGS, tmp_path / "out", saving=Saving(steps=2)))
    (tmp_path / "out" / ".curves.png.0123abcd.partial").write_bytes(b"half")
    events = list(train(session, data, SETTINGS, tmp_path / "out", resume=True))
    assert [type(event) for event in events] == [Started, Finished]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "training.json",
    ]  # fmt: skip


def test_an_adapter_that_cannot_be_written_is_written_later(session, data, tmp_path, monkeypatch):
    from ondevice.train import loop

    def full(*_):
        raise OnDeviceError("No space left on device.", "Choose another place.")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_artifact", full)
        with pytest.raises(OnDeviceError, match="No space left") as told:
            list(train(session, data, SETTINGS, tmp_path / "out"))
    assert "All steps are kept" in told.value.hint
    events = list(train(session, data, SETTINGS, tmp_path / "out", resume=True))
    assert not [e for e in events if isinstance(e, StepDone)]
    whole = list(train(session, data, SETTINGS))[-1]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file() and events[-1].kept == whole.kept
    assert all((events[-1].parameters[name] == values).all() for name, values in whole.parameters.items())
