"""A tokenizer that knows more tokens than its model, as Gemma 3's of 1B does."""

from __future__ import annotations

import json

import pytest

from ondevice.errors import OnDeviceError
from ondevice.runtime.session import open_session
from ondevice.tools.calibration import windows
from ondevice.tools.evaluate.text import evaluate
from ondevice.tools.explain import explain
from ondevice.tools.prune import Amount, Options, prune
from ondevice.train import load_data
from tests.tools.wide_models import write_model

TEXT = "the and in the other hand, on a cold day; " * 30


@pytest.fixture
def model(tmp_path):
    folder = write_model(tmp_path / "model")
    described = json.loads((folder / "tokenizer_config.json").read_text())
    described["additional_special_tokens"] = ["<image>"]
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


def test_its_vocabulary_can_be_cut(model, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    with open_session(model, backend="cpu", exact=True) as session:
        assert session.tokenizer.vocab_size == session.config.vocab + 1
        (wanted,) = (e for e in evaluate(session, TEXT, 64, 64) if hasattr(e, "perplexity"))
    for number, asked in enumerate(({"vocabulary": Amount(104)}, {"keep_vocabulary": tmp_path / "text.txt"})):
        options = Options(**asked, calibration=tmp_path / "text.txt", tokens=256, length=64)
        *_, result = prune(model, tmp_path / str(number), options)
        assert result.after.parameters <= result.before.parameters
        with open_session(tmp_path / str(number), backend="cpu", exact=True) as session:
            (found,) = (e for e in evaluate(session, TEXT, 64, 64) if hasattr(e, "perplexity"))
        assert found.own.losses.size == wanted.own.losses.size


def test_what_the_model_does_not_know_is_said(model, tmp_path):
    (tmp_path / "text.txt").write_text("the <image> " + TEXT)
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "the <image> and"}))
    with open_session(model, backend="cpu") as session:
        for use in (
            lambda: windows(session, tmp_path / "text.txt", 64),
            lambda: list(evaluate(session, "the <image> and", 64)),
            lambda: list(explain(session, session.encode_prompt("the <image>"))),
            lambda: load_data(tmp_path / "data.jsonl", session, 64),
        ):
            with pytest.raises(OnDeviceError, match="has token ids outside"):
                use()
