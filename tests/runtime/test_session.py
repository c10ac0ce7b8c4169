"""What a model's own files say of how it is used."""

from __future__ import annotations

import json

import pytest

from ondevice.backends.base import SamplingParams
from ondevice.errors import BadFile
from ondevice.runtime.session import open_session
from tests.tiny_model import write_tiny_model


@pytest.fixture
def opened(tmp_path):
    """text of generation_config.json -> a session of the tiny model with it"""
    sessions = []

    def make(text: str):
        folder = write_tiny_model(tmp_path / "model")
        (folder / "generation_config.json").write_text(text)
        sessions.append(open_session(folder, backend="cpu"))
        return sessions[-1]

    yield make
    for session in sessions:
        session.close()


def test_sampling_is_as_the_authors_say(opened):
    said = {"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}
    session = opened(json.dumps(said | {"eos_token_id": [1, 2]}))
    assert session.default_sampling() == SamplingParams(temperature=0.6, top_k=20, repetition=1.1)
    assert session.stop_ids >= {1, 2}


@pytest.mark.parametrize(
    "text",
    [
        '{"do_sample": true, "top_k": NaN}', '{"do_sample": true, "temperature": 1e999}', "[1]", "{", "[" * 100_000,
        '{"do_sample": true, "top_p": "much"}',
    ],
)  # fmt: skip
def test_sampling_that_makes_no_sense(text, opened):
    session = opened(text)
    with pytest.raises(BadFile, match=r"generation_config\.json"):
        session.default_sampling()
