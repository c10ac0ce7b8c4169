"""SmolLM2: the losses of peft, and a task that it cannot do before and can do afterwards. Minutes, so slow."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ondevice.checkpoint import open_checkpoint
from ondevice.runtime.engine import GenerateOptions
from ondevice.runtime.session import open_session
from ondevice.runtime.text import Piece
from ondevice.tools.convert import convert, plan
from ondevice.train import Settings, load_data, train

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
