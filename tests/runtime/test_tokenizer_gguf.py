"""Byte-level BPE out of GGUF against llama.cpp's ids, and what transformers makes of the files written from it."""

from __future__ import annotations

import json
import random

import pytest

from ondevice.errors import BadFile, OnDeviceError, Unsupported
from ondevice.runtime.tokenizer import load_tokenizer
from ondevice.runtime.tokenizer.first import FIRST
from ondevice.runtime.tokenizer.pretokenizers import KINDS, RULES

NAMES = [names.split()[0] for names in RULES.values()]


def without(metadata, *keys, **changed):
    """A copy of the metadata; keys are those after tokenizer.ggml."""
    copy = {key: metadata[key] for key in metadata} | {f"tokenizer.ggml.{key}": v for key, v in changed.items()}
    return {key: v for key, v in copy.items() if key.removeprefix("tokenizer.ggml.") not in keys}


def test_ids_are_those_of_llama_cpp(smollm2, oracle):
    assert len(oracle["texts"]) > 2000
    for text, ids, plain in zip(oracle["texts"], oracle["smollm2"], oracle["smollm2_plain"], strict=True):
        assert smollm2.encode(text) == ids, text
        assert smollm2.encode(text, parse_special=False) == plain, text


@pytest.mark.parametrize("pre", NAMES)
def test_every_pre_tokenizer_cuts_like_llama_cpp(pre, smollm2_metadata, oracle):
    tokenizer = load_tokenizer(without(smollm2_metadata, pre=pre))
    for text, ids in zip(oracle["some_texts"], oracle["pre"][pre], strict=True):
        assert tokenizer.encode(text, add_special=False) == ids, text


def test_special_tokens(smollm2):
    assert smollm2.vocab_size == 49152
    assert (smollm2.bos_id, smollm2.bos_token, smollm2.eos_token) == (1, "<|im_start|>", "<|im_end|>")
    assert smollm2.eos_ids == {0, 2}
    assert smollm2.special_ids == set(range(17))
    assert smollm2.encode("<|im_end|>") == [2]
    assert not smollm2.special_ids & set(smollm2.encode("<|im_end|>", parse_special=False))
    assert smollm2.decode([2, 9690, 2]) == "system"
    assert smollm2.decode([2, 9690], skip_special=False) == "<|im_end|>system"
    assert "im_start" in smollm2.chat_template


def test_bos_and_eos_where_the_file_asks_for_them(smollm2_metadata):
    added = load_tokenizer(without(smollm2_metadata, add_bos_token=True, add_eos_token=True))
    assert added.encode("Hi") == [1, 26843, 2] and added.encode("Hi", add_special=False) == [26843]
    assert added.encode("") == [1, 2]
    silent = load_tokenizer(without(smollm2_metadata, "add_bos_token", pre="llama-bpe"))
    assert silent.encode("Hi") == [1, 26843]  # Llama 3's add BOS unless told otherwise


def test_a_word_that_is_a_token_is_one_where_merges_are_ignored(smollm2_metadata):
    tokens, types = (smollm2_metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    longer = {"tokens": [*tokens, "Ġxyzzyplugh"], "token_type": [*types, 1]}
    for pre, whole in {"llama-bpe": True, "tekken": True, "youtu": True, "dbrx": False, "qwen2": False}.items():
        tokenizer = load_tokenizer(without(smollm2_metadata, pre=pre, add_bos_token=False, **longer))
        assert (tokenizer.encode(" xyzzyplugh") == [len(tokens)]) == whole, pre


@pytest.mark.parametrize(
    ("special", "ends"),
    [
        (["<|im_end|>", "<|im_start|>"], {"<|im_end|>"}),
        (["<|end|>", "<|endoftext|>"], {"<|end|>", "<|endoftext|>"}),
        (["<|end|>", "<|return|>", "<|call|>"], {"<|return|>", "<|call|>"}),  # there <|end|> ends a channel
    ],
)
def test_tokens_that_end_an_answer_by_their_text(smollm2_metadata, special, ends):
    tokens = [*special, *smollm2_metadata["tokenizer.ggml.tokens"][17:]]
    types = [1] * len(tokens)  # some converters forget what is special
    merges = smollm2_metadata["tokenizer.ggml.merges"]
    keys = {"model": "gpt2", "pre": "smollm", "tokens": tokens, "token_type": types, "merges": merges}
    tokenizer = load_tokenizer({f"tokenizer.ggml.{key}": value for key, value in keys.items()})
    assert {tokens[id] for id in tokenizer.eos_ids} == ends
    assert tokenizer.encode(special[0]) == [0]


@pytest.mark.parametrize(
    ("missing", "changed", "error", "says"),
    [
        (["pre"], {}, BadFile, "how its tokenizer cuts"),
        ([], {"pre": "smolm"}, Unsupported, "smollm"),
        ([], {"model": "t5"}, Unsupported, "t5"),
        (["model"], {}, BadFile, "no tokenizer"),
        (["tokens"], {}, BadFile, "0 tokens"),
        (["merges"], {}, BadFile, "no merges"),
        ([], {"merges": ["a b", "ab"]}, BadFile, "no merges"),
        ([], {"merges": [1, 2]}, BadFile, "merges"),
        ([], {"tokens": ["a", "a"], "token_type": [1, 1]}, BadFile, "twice"),
        ([], {"token_type": [1, 2, 3]}, BadFile, "3 types"),
        ([], {"token_type": "many"}, BadFile, "token_type as str"),
        ([], {"eos_token_id": 49152}, BadFile, "49152"),
        ([], {"bos_token_id": -1}, BadFile, "-1"),
        ([], {"eot_token_id": "<|im_end|>"}, BadFile, "eot_token_id"),
        (["bos_token_id"], {"add_bos_token": True}, BadFile, "names none"),
    ],
)
def test_bad_metadata_is_told(smollm2_metadata, missing, changed, error, says):
    with pytest.raises(error, match=says) as told:
        load_tokenizer(without(smollm2_metadata, *missing, **changed))
    assert isinstance(told.value, OnDeviceError) and told.value.hint and "\n" not in told.value.message


def test_merges_that_do_not_fit_the_tokens_are_told_where_they_matter(smollm2_metadata):
    """In a first text those that apply; in others, and where the tokenizer is written, all of them."""
    tokenizer = load_tokenizer(without(smollm2_metadata, merges=["a b", "Ġ q", "Ġq z"]))
    assert tokenizer.encode("ab") == [tokenizer.vocabulary.ids["ab"]]
    for fails in (lambda: tokenizer.encode("a qz"), lambda: tokenizer.encode("ab " * FIRST), tokenizer.files):
        with pytest.raises(BadFile, match=r"merges do not fit its tokens: .*Ġqz"):
            fails()


@pytest.mark.parametrize("pre", NAMES)
def test_first_texts_have_the_ids_that_the_library_gives_them(pre, smollm2_metadata, oracle):
    """Special tokens, one that is always found (a longer one begins with it) and words of any length among them."""
    types = list(smollm2_metadata["tokenizer.ggml.token_type"])
    tokens = smollm2_metadata["tokenizer.ggml.tokens"] + ["<|im", "<|im_end|>ish"]
    changed = without(smollm2_metadata, pre=pre, tokens=tokens, token_type=[*types, 4, 4])
    engine, library = load_tokenizer(changed).engine, load_tokenizer(changed).engine.indexed
    engine._left = 1 << 30
    rng = random.Random(1)
    texts = ["", "a" * 300, "aaaa" * 20 + " <|im_end|>", "<|im_end|>ish<|im_end|>i<|im<|im_start|>"]
    texts += ["".join(rng.choices([*oracle["some_texts"], *tokens[:17], *tokens[-2:], " "], k=5)) for _ in range(40)]
    own = [engine._encoded(text, special) for text in texts for special in (True, False)]
    theirs = [library.encode(text, special) for text in texts for special in (True, False)]
    assert own.count(None) < 10 and [ids for ids in own if ids is not None] == [
        ids for ids, mine in zip(theirs, own, strict=True) if mine is not None
    ]
    assert [engine.encode(text, special) for text in texts for special in (True, False)] == theirs
    assert [engine.partition(text) for text in texts] == [library.partition(text) for text in texts]


@pytest.mark.parametrize("text", ["word " * (FIRST // 10 + 1), "a" * 256])
def test_the_library_is_not_made_for_a_first_prompt(smollm2_metadata, text):
    """But for the texts behind it, and for one with a word as no language has it."""
    tokenizer = load_tokenizer(smollm2_metadata)
    tokenizer.encode("<|im_start|>user\nThe capital of France, and grüße 🙂<|im_end|>\n" * 20)
    assert "indexed" not in vars(tokenizer.engine)
    tokenizer.encode(text)
    ids = tokenizer.encode(text)
    assert "indexed" in vars(tokenizer.engine) and ids == tokenizer.engine.indexed.encode(text, True)


def test_names_of_pre_tokenizers_are_unique():
    assert sum(len(names.split()) for names in RULES.values()) == len(KINDS)


@pytest.mark.parametrize("add_bos", [False, True])
def test_transformers_reads_the_files(smollm2_metadata, oracle, tmp_path, add_bos):
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(without(smollm2_metadata, add_bos_token=add_bos))
    for name, content in tokenizer.files().items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for text in oracle["texts"]:
        ids = tokenizer.encode(text)
        assert theirs.encode(text) == ids, text
        assert ours.encode(text) == ids, text
    assert theirs.chat_template == ours.chat_template == tokenizer.chat_template
    assert (ours.eos_ids, ours.special_ids) == (tokenizer.eos_ids, tokenizer.special_ids)
    assert theirs.eos_token_id == 2 and theirs.bos_token_id == 1
    assert ours.files() == tokenizer.files()
