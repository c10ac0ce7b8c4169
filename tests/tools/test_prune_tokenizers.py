"""Vocabularies of every kind of tokenizer, cut: text whose tokens all stay is cut as before, other text can be read."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ondevice.runtime.tokenizer import load_tokenizer
from ondevice.runtime.tokenizer.vocabulary import SPACE
from ondevice.tools.prune.options import Amount
from tests.models import twins
from tests.runtime.small_tokenizers import SIZES, sentencepiece_model
from tests.runtime.texts import lines

from .test_prune import logits, pruned

pytest.importorskip("transformers")
ADDED = "<|call|>", "<|done|>"


def unigram() -> Tokenizer:
    """A tokenizer.json of T5's kind: no bytes to fall back to."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(SPACE), decoders.Metaspace(SPACE)
    trainer = trainers.UnigramTrainer(
        vocab_size=900, unk_token="<unk>", special_tokens=["<unk>", "</s>"], show_progress=False
    )
    made.train_from_iterator(lines() * 3, trainer)
    made.add_special_tokens(["<|call|>"])
    return made


def write_tokenizer(kind: str, folder) -> None:
    described = {"eos_token": "</s>"}
    if kind == "json":
        unigram().save(str(folder / "tokenizer.json"))
    else:
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(True, kind=kind))
        (folder / "added_tokens.json").write_text(json.dumps({t: SIZES[kind] + i for i, t in enumerate(ADDED)}))
        described |= {"tokenizer_class": "LlamaTokenizer", "legacy": False, "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


@pytest.mark.parametrize("kind", ["bpe", "unigram", "json"])
def test_what_stays_is_cut_as_before(kind, tmp_path):
    twins.make("llama", vocab_size=1502).save_pretrained(tmp_path / "in")
    write_tokenizer(kind, tmp_path / "in")
    text = "\n".join(lines()[::2])
    (tmp_path / "text.txt").write_text(text)
    pruned(tmp_path / "in", tmp_path / "out", keep_vocabulary=tmp_path / "text.txt")
    old, new = load_tokenizer(tmp_path / "in"), load_tokenizer(tmp_path / "out")
    assert new.vocab_size < old.vocab_size
    kept = [old.vocabulary.ids[piece] for piece in new.vocabulary.texts]
    assert kept == sorted(kept)
    assert [kept[id] for id in new.encode(text)] == old.encode(text)
    for line in lines():
        assert new.decode(new.encode(line)) == old.decode(old.encode(line))
    assert new.vocabulary.texts[new.named_ids["eos"]] == "</s>"
    assert new.decode(new.encode("<|call|>"), skip_special=False).strip() == "<|call|>"
    ids = np.array([new.encode(lines()[0])], np.int32)
    assert logits(tmp_path / "out", ids).shape[-1] == len(kept) or kind == "json"


def test_the_largest_that_is_asked_for(tmp_path):
    twins.make("llama", vocab_size=1502).save_pretrained(tmp_path / "in")
    write_tokenizer("unigram", tmp_path / "in")
    (tmp_path / "text.txt").write_text("\n".join(lines()[:4]))
    pruned(tmp_path / "in", tmp_path / "out", vocabulary=Amount(1000), calibration=tmp_path / "text.txt", length=16)
    assert load_tokenizer(tmp_path / "out").vocab_size == 1000
