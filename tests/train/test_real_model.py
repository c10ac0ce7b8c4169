"""SmolLM2: the losses of peft, and a task that it cannot do before and can do afterwards. Minutes, so slow."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from ondevice.checkpoint import open_checkpoint
from ondevice.runtime.engine import GenerateOptions
from ondevice.runtime.session import open_session
from ondevice.runtime.text import Piece
from ondevice.tools.convert import convert, plan
from ondevice.train import Settings, StepDone, load_data, train
from ondevice.train.curves import draw

from .conftest import sums, write_lines
from .test_oracle import compare

sys.path.append(str(Path(__file__).parents[2] / "examples"))
pytestmark = pytest.mark.slow


def test_twenty_steps_of_peft(smollm2_gguf, tmp_path):
    folder = tmp_path / "folder"
    convert(plan(open_checkpoint(smollm2_gguf), "bfloat16", dequantize=True), folder)
    data = write_lines(tmp_path / "data.jsonl", sums(9))
    compare(folder, data, tmp_path, "cpu", Settings(steps=20, learning_rate=5e-4, batch_size=2))


def share_right(session, lines) -> float:
    right = 0
    for *prompt, answer in (line["messages"] for line in lines):
        pieces = session.generate(session.encode_messages(prompt), GenerateOptions(max_tokens=16))
        right += "".join(p.text for p in pieces if isinstance(p, Piece)).strip() == answer["content"]
    return right / len(lines)


def test_overfitting_is_caught(smollm2_gguf, tmp_path):
    """The other run of docs/train.md: mistakes are learnt by heart, which helps with nothing else."""
    import verdicts

    for name, lines in verdicts.splits().items():
        write_lines(tmp_path / "data" / f"{name}.jsonl", lines)
    settings = Settings(batch_size=8, steps=100, learning_rate=1e-3, validate_every=5, patience=4)
    with open_session(smollm2_gguf, backend="cpu", context=256) as session:
        events = list(train(session, load_data(tmp_path / "data", session, 128), settings, tmp_path / "adapter"))
    steps, finished = [e for e in events if isinstance(e, StepDone)], events[-1]
    measured = {e.step: e.validation_loss for e in steps if e.validation_loss is not None}
    assert finished.stopped_early and finished.step < 100
    assert finished.kept == min(measured, key=measured.get) == finished.step - 20
    assert finished.validation_loss == measured[finished.kept] < measured[finished.step] - 0.1
    learnt = {at: np.mean([e.loss for e in steps[at - 5 : at]]) for at in (finished.kept, finished.step)}
    assert learnt[finished.step] < learnt[finished.kept], "what was learnt from went on getting better"
    assert draw(tmp_path / "adapter").stat().st_size > 10_000


def test_dates_are_learnt(smollm2_gguf, tmp_path):
    """The run of docs/train.md: no date of the test stands in what is learnt from."""
    import dates

    splits = dates.splits()
    for name, lines in splits.items():
        write_lines(tmp_path / "data" / f"{name}.jsonl", lines)
    with open_session(smollm2_gguf, backend="cpu", context=256) as session:
        before = share_right(session, splits["test"][:40])
        data = load_data(tmp_path / "data", session, 128)
        settings = Settings(batch_size=8, steps=80, learning_rate=1e-3)
        list(train(session, data, settings, tmp_path / "adapter"))
        session.adapt([(tmp_path / "adapter", 1.0)])
        after = share_right(session, splits["test"])
    assert before < 0.2
    assert after > 0.95
