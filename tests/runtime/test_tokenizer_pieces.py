"""sentencepiece's tokenizers: inside GGUF against llama.cpp and sentencepiece itself, as tokenizer.model against
transformers."""

from __future__ import annotations

import json
import struct

import pytest
import sentencepiece

from ondevice.errors import BadFile
from ondevice.runtime.tokenizer import load_tokenizer, proto
from tests.runtime.small_tokenizers import as_gguf, sentencepiece_model
from tests.runtime.texts import texts

PREFIX = pytest.mark.parametrize("dummy_prefix", [True, False], ids=["prefix", "no prefix"])


@pytest.fixture(scope="module", name="models")
def small_models() -> dict[bool, bytes]:
    return {dummy_prefix: sentencepiece_model(dummy_prefix) for dummy_prefix in (True, False)}


@pytest.fixture(scope="module", name="transformers")
def needs_transformers():
    return pytest.importorskip("transformers")


def without(metadata, *keys, **changed):
    copy = metadata | {f"tokenizer.ggml.{key}": value for key, value in changed.items()}
    return {key: value for key, value in copy.items() if key.removeprefix("tokenizer.ggml.") not in keys}


@pytest.mark.parametrize("which", [0, 1])
def test_ids_are_those_of_llama_cpp(oracle, which):
    expected = oracle["spm"][which]
    tokenizer = load_tokenizer(expected["metadata"])
    for text, ids, plain in zip(oracle["texts"][::3], expected["ids"], expected["plain"], strict=True):
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.encode(text, parse_special=False) == plain, text


@PREFIX
def test_plain_text_is_sentencepieces(models, dummy_prefix):
    processor = sentencepiece.SentencePieceProcessor(model_proto=models[dummy_prefix])
    tokenizer = load_tokenizer(as_gguf(models[dummy_prefix]))
    for text in texts():
        ids = tokenizer.encode(text, add_special=False, parse_special=False)
        assert ids == processor.encode(text), text
        assert tokenizer.decode(ids) == text
        stream = tokenizer.stream()
        assert "".join([*map(stream.push, ids), stream.flush()]) == text


def test_special_tokens(models):
    tokenizer = load_tokenizer(as_gguf(models[True]))
    start, end = 3, 4
    assert tokenizer.encode("") == [1] and tokenizer.bos_id == 1
    assert tokenizer.eos_ids == {2, end}
    assert tokenizer.encode("<|im_start|><|im_end|>") == [1, start, end]
    assert not {start, end} & set(tokenizer.encode("<|im_start|><|im_end|>", parse_special=False))
    assert tokenizer.piece(end) == "<|im_end|>" and tokenizer.decode([1, end]) == ""
    assert tokenizer.decode([1, *tokenizer.encode("x", add_special=False)], skip_special=False) == "<s> x"


@PREFIX
def test_transformers_reads_what_a_gguf_becomes(models, dummy_prefix, transformers, tmp_path):
    tokenizer = load_tokenizer(as_gguf(models[dummy_prefix]))
    for name, content in tokenizer.files().items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_proto=(tmp_path / "tokenizer.model").read_bytes())
    for text in texts():
        ids = tokenizer.encode(text)
        assert theirs.encode(text) == ids, text
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert processor.encode(text) == tokenizer.encode(text, add_special=False, parse_special=False)


CONFIGS = {
    "plain": {},
    "bos": {"add_bos_token": True},
    "bos and eos": {"add_bos_token": True, "add_eos_token": True},
    "legacy": {"add_bos_token": True, "legacy": True},
    "no space": {"add_bos_token": True, "add_prefix_space": False},
    "added": {
        "added_tokens_decoder": {
            "1500": {"content": "<extra>", "special": True, "normalized": False},
            "1501": {"content": "<shown>", "special": False, "normalized": False},
            "1502": {"content": "<greedy>", "special": True, "lstrip": True, "rstrip": True, "normalized": False},
        }
    },
}


@PREFIX
@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_with_tokenizer_model(models, dummy_prefix, name, transformers, tmp_path):
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"} | CONFIGS[name]
    (tmp_path / "tokenizer.model").write_bytes(models[dummy_prefix])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    added = [
        f"{a}{token}{b}" for token in ("<extra>", "<shown>", "<greedy>") for a in ("", "x ", "\n") for b in ("", " y")
    ]
    for text in [*texts()[::3], *added]:
        assert ours.encode(text) == theirs.encode(text), text
        plain = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text, add_special=False, parse_special=False) == plain, text
    assert ours.special_ids == {id for id, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.files().keys() == {"tokenizer.model", "tokenizer_config.json"}
    assert ours.files()["tokenizer.model"] == models[dummy_prefix]


@pytest.mark.parametrize(
    ("missing", "changed", "says"),
    [
        (["scores"], {}, "0 scores"),
        ([], {"scores": [0.5]}, "1 scores"),
        ([], {"scores": ["x"] * 1500}, "scores"),
        ([], {"token_type": [1] * 1500}, "does not add up"),  # no unknown token
        ([], {"token_type": [2] * 1500}, "does not add up"),
        ([], {"bos_token_id": 1500}, "1500"),
        ([], {"add_space_prefix": "yes"}, "add_space_prefix"),
    ],
)
def test_bad_metadata_is_told(models, missing, changed, says):
    with pytest.raises(BadFile, match=says) as told:
        load_tokenizer(without(as_gguf(models[True]), *missing, **changed))
    assert told.value.hint


@pytest.mark.parametrize("cut", [0, 1, 100, 5000])
def test_a_truncated_model_is_told(models, cut, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(models[True][:cut])
    with pytest.raises(BadFile):
        load_tokenizer(tmp_path)


def test_model_files_read_as_written(models):
    model = proto.read(models[True])
    assert (model.type, model.byte_fallback, model.unk_id, model.bos_id, model.eos_id) == (proto.BPE, 1, 0, 1, 2)
    assert proto.read(proto.write(model)) == model
    assert model.dummy_prefix and not proto.read(proto.without_dummy_prefix(models[True])).dummy_prefix
    assert model.pieces[10][1] == struct.unpack("<f", struct.pack("<f", model.pieces[10][1]))[0]


@pytest.mark.parametrize("raw", [b"\x0a\xff\xff\xff\xff\x0f", b"\x80" * 20, b"\x0b", b"\x08\x01", b"\x0a\x02\x0a\x05"])
def test_hostile_bytes_are_a_value_error(raw):
    with pytest.raises(ValueError):
        proto.read(raw)
