"""A tiny model and small data to train it on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ondevice.runtime.session import open_session
from tests.tiny_model import write_tiny_model


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def sums(most: int) -> list[dict]:
    return [chat(f"What is {a} plus {b}?", f"It is {a + b}.") for a in range(most) for b in range(most)]


def write_lines(path: Path, lines: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> Path:
    return write_lines(tmp_path_factory.mktemp("data") / "sums.jsonl", sums(6))


@pytest.fixture(scope="session")
def session(tiny):
    with open_session(tiny, backend="cpu", exact=True) as opened:
        yield opened
