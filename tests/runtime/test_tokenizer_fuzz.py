"""Damaged and hostile tokenizers, in their thousands: they work or are refused in two lines; nothing else happens."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ondevice.errors import OnDeviceError
from ondevice.runtime.tokenizer import load_tokenizer, proto
from tests.runtime.small_tokenizers import as_gguf, byte_level, llama_like, sentencepiece_model

VALUES = [
    None, True, -1, 0, 3, 10**6, 2**32 - 1, 2**40, 1.5, "", "x", "▁", "<0x41>", [], {}, ["a"], [["a", "b"]],
    {"String": "("}, {"Regex": "("}, "BPE", "Unigram", "ByteLevel", "Sequence",
]  # fmt: skip
TEXTS = ["", "x", "▁", "<0x41>", "<0xZZ>", "a" * 9999, "\0"]


@pytest.fixture(scope="module", name="originals")
def original_files() -> dict[str, Any]:
    documents = [json.loads(t.to_str()) for t in (byte_level(), llama_like(True), llama_like(False))]
    return {"json": documents, "model": sentencepiece_model(True)}


def with_one_changed(rng: random.Random, value: Any) -> Any:
    """A copy with something else at a random place."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(VALUES)
    at = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    copy = value.copy()
    copy[at] = with_one_changed(rng, value[at])
    return copy


def with_bytes_changed(rng: random.Random, raw: bytes) -> bytes:
    changed = bytearray(raw)
    for _ in range(rng.choice([1, 2, 20])):
        at = rng.randrange(len(changed))
        kind = rng.randrange(3)
        if kind == 0:
            changed[at] = rng.randrange(256)
        elif kind == 1:
            del changed[at : at + rng.choice([1, 100])]
        else:
            changed[at:at] = rng.randbytes(4)
    return bytes(changed)


def with_pieces_changed(rng: random.Random, raw: bytes) -> proto.Model:
    model = proto.read(raw)
    pieces = list(model.pieces)
    for _ in range(rng.choice([0, 1, 3])):
        score = rng.choice([0.0, float("nan"), float("inf"), -1e30])
        pieces[rng.randrange(len(pieces))] = rng.choice(TEXTS), score, rng.randrange(9)
    name = rng.choice(["type", "byte_fallback", "unk_id", "bos_id", "eos_id", "pad_id"])
    return replace(model, pieces=pieces, **{name: rng.choice([-1, 0, 1, 2, 7, 1499])})


def hostile(rng: random.Random, originals: dict[str, Any], folder: Path) -> Any:
    """A source for load_tokenizer."""
    for file in folder.iterdir():
        file.unlink()
    kind = rng.randrange(4)
    if kind == 0:
        document = with_one_changed(rng, rng.choice(originals["json"]))
        (folder / "tokenizer.json").write_text(json.dumps(document))
    elif kind == 1:
        (folder / "tokenizer.model").write_bytes(with_bytes_changed(rng, originals["model"]))
    elif kind == 2:
        (folder / "tokenizer.model").write_bytes(proto.write(with_pieces_changed(rng, originals["model"])))
    else:
        return with_one_changed(rng, as_gguf(originals["model"]))
    if rng.random() < 0.3:
        config = {"bos_token": "<s>", "add_bos_token": True, "added_tokens_decoder": {"1500": {"content": "<q>"}}}
        (folder / "tokenizer_config.json").write_text(json.dumps(with_one_changed(rng, config)))
    return folder


def loads(rng: random.Random, originals: dict[str, Any], folder: Path) -> bool:
    source = hostile(rng, originals, folder)
    if not isinstance(source, (dict, Path)):
        return False
    try:
        tokenizer = load_tokenizer(source)
        ids = tokenizer.encode("Hi <|im_end|> é的  x\n\0")
        tokenizer.encode("<s>Hi", parse_special=False)
        assert isinstance(tokenizer.decode([*ids, *range(-2, tokenizer.vocab_size + 2, 97)]), str)
    except OnDeviceError as error:
        assert error.hint and "\n" not in error.message
        return False
    return True


@pytest.mark.parametrize("seed", range(4))
def test_hundreds(originals, tmp_path, seed):
    rng = random.Random(seed)
    assert 5 < sum(loads(rng, originals, tmp_path) for _ in range(60)) < 55  # else nothing was tried


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 14))
def test_thousands(originals, tmp_path, seed):
    rng = random.Random(seed)
    assert sum(loads(rng, originals, tmp_path) for _ in range(300)) > 20
