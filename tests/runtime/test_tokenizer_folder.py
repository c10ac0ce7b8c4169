"""Hugging Face folders: tokenizer.json with every configuration beside it that changes ids, against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ondevice.errors import BadFile, OnDeviceError, Unsupported
from ondevice.runtime.tokenizer import load_tokenizer
from tests.runtime.small_tokenizers import byte_level, llama_like
from tests.runtime.texts import texts


@pytest.fixture(scope="module", name="kinds")
def small_tokenizers():
    return {"bytes": byte_level(), "normalized": llama_like(True), "metaspace": llama_like(False)}


def folder(path: Path, tokenizer, config, **others) -> Path:
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for name, content in ({"tokenizer_config": config} | others).items():
        if content is not None:
            (path / f"{name}.json").write_text(json.dumps(content))
    return path


def spelled(*texts_of_tokens: str) -> list[str]:
    around = ("{}", "a {} b", "\n{0}{0}\n", " {}")
    return [place.format(token) for token in texts_of_tokens for place in around]


PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}
ENDS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CASES = {
    "bytes": ("bytes", PLAIN),
    "bytes, bos and eos": ("bytes", PLAIN | ENDS | {"add_bos_token": True, "add_eos_token": True}),
    "bytes, bos denied": ("bytes", PLAIN | ENDS | {"add_bos_token": None}),
    "bytes, a token as an object": (
        "bytes",
        PLAIN | ENDS | {"pad_token": {"__type": "AddedToken", "content": "<pad>", "lstrip": True}},
    ),
    "bytes, thinking named": ("bytes", PLAIN | {"additional_special_tokens": ["<think>"]}),
    "bytes, more tokens": (
        "bytes",
        PLAIN
        | {"added_tokens_decoder": {"1205": {"content": "<later>", "special": True}, "1206": {"content": "<more>"}}},
    ),
    "normalized": ("normalized", PLAIN),
    "normalized, llama": ("normalized", LLAMA),
    "normalized, llama legacy": ("normalized", LLAMA | {"legacy": True}),
    "normalized, llama fast": ("normalized", LLAMA | {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}),
    "metaspace": ("metaspace", PLAIN),
    "metaspace, llama without a space": ("metaspace", LLAMA | {"add_prefix_space": False}),
    "metaspace, no bos": ("metaspace", PLAIN | {"bos_token": "<s>", "add_bos_token": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_transformers(kinds, name, tmp_path):
    transformers = pytest.importorskip("transformers")
    kind, config = CASES[name]
    folder(tmp_path, kinds[kind], config)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    tokens = spelled("<think>", "<tool_call>", "<later>", "<more>", "<pad>", "<|im_start|>", "<s>")
    for text in [*texts()[:: 1 if name == kind else 4], *tokens]:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.encode(text, add_special=False) == theirs.encode(text, add_special_tokens=False), text
        plain = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text, add_special=False, parse_special=False) == plain, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids), text
    assert ours.special_ids == {id for id, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    assert (ours.bos_id, ours.bos_token or None) == (theirs.bos_token_id, theirs.bos_token)


def test_files_are_handed_on_unchanged(kinds, tmp_path):
    folder(tmp_path, kinds["bytes"], PLAIN, special_tokens_map=ENDS)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "model.py").write_text("raise SystemExit")
    tokenizer = load_tokenizer(tmp_path)
    expected = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}
    assert tokenizer.files() == {name: (tmp_path / name).read_bytes() for name in expected}
    assert tokenizer.bos_token == "<|im_start|>"  # from the older file


def test_parts_between_special_tokens(kinds, tmp_path):
    for kind in kinds:
        folder(tmp_path, kinds[kind], PLAIN)
        tokenizer = load_tokenizer(tmp_path)
        start, end = (tokenizer.vocabulary.ids[text] for text in ("<|im_start|>", "<|im_end|>"))
        text = "é <|im_start|>user\n<think> 的<|im_end|>\n"
        parts = tokenizer.partition(text)
        assert parts == ["é ", start, "user\n<think> 的", end, "\n"]
        ids: list[int] = []
        for part in parts:
            ids += [part] if isinstance(part, int) else tokenizer.encode_plain(part, start=not ids)
        assert ids == tokenizer.encode(text, add_special=False)


@pytest.mark.parametrize(
    ("generation", "config", "stops"),
    [
        (None, {}, {"<|endoftext|>", "<|im_end|>"}),
        (None, {"eos_token": "<think>"}, {"<think>", "<|endoftext|>", "<|im_end|>"}),
        ({"eos_token_id": 5}, {}, {5, "<|endoftext|>", "<|im_end|>"}),
        ({"eos_token_id": [5, 6, 10**9]}, {}, {5, 6, "<|endoftext|>", "<|im_end|>"}),
    ],
)
def test_what_ends_an_answer(kinds, generation, config, stops, tmp_path):
    folder(tmp_path, kinds["bytes"], PLAIN | config, generation_config=generation)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_ids == {tokenizer.vocabulary.ids.get(stop, stop) for stop in stops}


@pytest.mark.parametrize(
    ("config", "file", "found"),
    [
        ({}, None, None),
        ({"chat_template": "A"}, None, "A"),
        ({"chat_template": "A"}, "B", "B"),
        ({"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}, None, "D"),
        ({"chat_template": {"what": 1}}, None, None),
    ],
)
def test_chat_templates(kinds, config, file, found, tmp_path):
    folder(tmp_path, kinds["bytes"], PLAIN | config)
    if file:
        (tmp_path / "chat_template.jinja").write_text(file)
    assert load_tokenizer(tmp_path).chat_template == found


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("tokenizer.json", None, BadFile),
        ("tokenizer.json", "", BadFile),
        ("tokenizer.json", "{", BadFile),
        ("tokenizer.json", '{"model": {"type": "BPE"}}', BadFile),
        ("tokenizer.json", "[]" * 1000, BadFile),
        ("tokenizer_config.json", "[1]", BadFile),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "y"}}', BadFile),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', BadFile),
        ("special_tokens_map.json", "\0", BadFile),
        ("generation_config.json", '"x"', BadFile),
    ],
)
def test_damage_is_told(kinds, name, content, error, tmp_path):
    folder(tmp_path, kinds["bytes"], PLAIN)
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(error) as told:
        load_tokenizer(tmp_path)
    assert isinstance(told.value, OnDeviceError) and "\n" not in told.value.message and told.value.hint


@pytest.mark.parametrize("end", range(0, 100, 7))
def test_a_truncated_tokenizer_json_is_told(kinds, end, tmp_path):
    raw = kinds["bytes"].to_str()
    (tmp_path / "tokenizer.json").write_text(raw[: len(raw) * end // 100])
    with pytest.raises(BadFile):
        load_tokenizer(tmp_path)


def test_a_decoder_that_is_not_known_is_refused(kinds, tmp_path):
    whole = json.loads(kinds["bytes"].to_str()) | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(Unsupported, match="WordPiece"):
        load_tokenizer(tmp_path)
