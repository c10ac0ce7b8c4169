"""Small tokenizers of every kind, trained on the texts of `texts.py`: none is downloaded."""

from __future__ import annotations

import io
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ondevice.runtime.tokenizer import proto
from ondevice.runtime.tokenizer.pretokenizers import QWEN2
from ondevice.runtime.tokenizer.vocabulary import SPACE, Kind
from tests.runtime.texts import lines

SIZES = {"bpe": 1500, "unigram": 1100}
CONTROL = ["<|im_start|>", "<|im_end|>"]


def sentencepiece_model(dummy_prefix: bool, user_defined: tuple[str, ...] = ("<tool>",), kind: str = "bpe") -> bytes:
    """A tokenizer.model with byte fallback, as Llama's and Gemma's are."""
    raw = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines() * 5),
        model_writer=raw,
        vocab_size=SIZES[kind],
        model_type=kind,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=dummy_prefix,
        control_symbols=CONTROL,
        user_defined_symbols=list(user_defined),
        num_threads=1,
        minloglevel=2,
    )
    return raw.getvalue()


def as_gguf(raw: bytes) -> dict[str, Any]:
    """The same tokenizer as GGUF's metadata, as llama.cpp's converter writes it."""
    model = proto.read(raw)
    keys = {
        "model": "llama",
        "tokens": [text.replace(SPACE, " ") if kind == Kind.USER_DEFINED else text for text, _, kind in model.pieces],
        "scores": [score for _, score, _ in model.pieces],
        "token_type": [kind for _, _, kind in model.pieces],
        "bos_token_id": model.bos_id,
        "eos_token_id": model.eos_id,
        "unknown_token_id": model.unk_id,
        "add_space_prefix": model.dummy_prefix,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def byte_level() -> Tokenizer:
    """A tokenizer.json like Qwen's: NFC, words, byte-level BPE, special tokens and tokens that are merely added."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN2), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1200, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(lines() * 3, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", *CONTROL])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("<tool_call>", normalized=False)])
    return tokenizer


def llama_like(normalized: bool) -> Tokenizer:
    """A tokenizer.json with sentencepiece's spelling. normalized: the space in front comes from a normalizer, as in
    older files; else from a pre-tokenizer."""
    model = proto.read(sentencepiece_model(True))
    ids = {text: id for id, (text, _, _) in enumerate(model.pieces)}
    ordinary = {text for text, _, kind in model.pieces if kind == Kind.NORMAL}
    merges = [
        (text[:cut], text[cut:])
        for text in sorted(ordinary, key=ids.__getitem__)
        for cut in range(1, len(text))
        if text[:cut] in ordinary and text[cut:] in ordinary
    ]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalized:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "first", split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", *CONTROL])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", ids["<s>"])])
    return tokenizer
