"""Tokenizers of folders as GGUF's keys: the same ids, the same metadata as the GGUF that they came from."""

from __future__ import annotations

import json

import pytest
from tokenizers import Regex, pre_tokenizers

from ondevice.errors import BadFile, Unsupported
from ondevice.runtime.tokenizer import Kind, gguf_tokenizer, load_tokenizer, proto
from ondevice.runtime.tokenizer.pretokenizers import RULES
from tests.runtime import small_tokenizers
from tests.runtime.texts import lines

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}


def folder(path, tokenizer, config=None):
    path.mkdir()
    if isinstance(tokenizer, bytes):
        (path / "tokenizer.model").write_bytes(tokenizer)
    else:
        tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config or {}))
    return path


def same_ids(one, other) -> bool:
    texts = [line.strip() for line in lines()]  # in front of spaces transformers and llama.cpp differ by design
    return all(one.encode(t, parse_special=False) == other.encode(t, parse_special=False) for t in texts)


@pytest.mark.parametrize("spaced", [True, False])
def test_sentencepiece_keeps_its_scores_and_kinds(spaced, tmp_path):
    raw = small_tokenizers.sentencepiece_model(spaced)
    path = folder(tmp_path / "in", raw, TOKENS | {"add_bos_token": True, "add_prefix_space": spaced})
    model, keys = proto.read(raw), gguf_tokenizer(path, 1600)
    assert keys["tokenizer.ggml.scores"][: len(model.pieces)] == [score for _, score, _ in model.pieces]
    assert keys["tokenizer.ggml.token_type"][: len(model.pieces)] == [kind for _, _, kind in model.pieces]
    assert set(keys["tokenizer.ggml.token_type"][len(model.pieces) :]) == {Kind.UNUSED}
    assert len(keys["tokenizer.ggml.tokens"]) == len(set(keys["tokenizer.ggml.tokens"])) == 1600
    assert keys["tokenizer.ggml.add_space_prefix"] is spaced and keys["tokenizer.ggml.add_bos_token"] is True
    assert same_ids(load_tokenizer(path), load_tokenizer(keys))


@pytest.mark.parametrize("normalized", [True, False])
def test_scores_are_made_of_merges_where_there_is_no_model_file(normalized, tmp_path):
    config = {name: value for name, value in TOKENS.items() if name != "tokenizer_class"}
    path = folder(tmp_path / "in", small_tokenizers.llama_like(normalized), config)
    keys = gguf_tokenizer(path, 1500)
    assert keys["tokenizer.ggml.model"] == "llama" and keys["tokenizer.ggml.bos_token_id"] == 1
    assert same_ids(load_tokenizer(path), load_tokenizer(keys))


def test_byte_level(tmp_path):
    path = folder(tmp_path / "in", small_tokenizers.byte_level(), {"eos_token": "<|im_end|>"})
    tokenizer = load_tokenizer(path)
    keys = gguf_tokenizer(path, tokenizer.vocab_size)
    assert keys["tokenizer.ggml.pre"] == "qwen2" and keys["tokenizer.ggml.model"] == "gpt2"
    kinds = dict(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<|im_start|>"], kinds["<think>"], kinds["a"]) == (Kind.CONTROL, Kind.USER_DEFINED, Kind.NORMAL)
    assert same_ids(tokenizer, load_tokenizer(keys))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: RULES[rule].split()[0])
def test_every_rule_is_found_by_what_it_does(rule, tmp_path):
    """Bailing's rule, spelled otherwise, cuts as Qwen2's."""
    tokenizer = small_tokenizers.byte_level()
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in rule.expressions]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.model.ignore_merges = rule.ignore_merges
    path = folder(tmp_path / "in", tokenizer)
    keys = gguf_tokenizer(path, 1300)
    names = RULES[rule].split()
    assert keys["tokenizer.ggml.pre"] in (*names, "qwen2" if "bailingmoe" in names else None)
    assert same_ids(load_tokenizer(path), load_tokenizer(keys))


def test_words_that_no_rule_cuts_so_are_refused(tmp_path):
    tokenizer = small_tokenizers.byte_level()
    words = pre_tokenizers.Split(Regex(r"[aeiou]+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    with pytest.raises(Unsupported, match="as no tokenizer does"):
        gguf_tokenizer(folder(tmp_path / "in", tokenizer), 1300)


def test_a_vocabulary_beyond_the_models_is_refused(tmp_path):
    with pytest.raises(BadFile, match="its model knows 100"):
        gguf_tokenizer(folder(tmp_path / "in", small_tokenizers.byte_level()), 100)


def test_tokens_added_beyond_the_models_are_left_out(tmp_path):
    path = folder(tmp_path / "in", small_tokenizers.byte_level(), {"eos_token": "<|im_end|>"})
    known = gguf_tokenizer(path, load_tokenizer(path).vocab_size)
    described = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<image>"]}
    (path / "tokenizer_config.json").write_text(json.dumps(described))
    assert "<image>" in load_tokenizer(path).special_texts
    assert gguf_tokenizer(path, len(known["tokenizer.ggml.tokens"])) == known
