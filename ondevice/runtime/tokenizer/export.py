"""A tokenizer as the files of a Hugging Face folder, such that transformers gives the same ids."""

from __future__ import annotations

import json
from dataclasses import replace

from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as Backend

from . import proto
from .tokenizer import Tokenizer
from .vocabulary import SPACE, Kind, Vocabulary

ROLES = ("bos", "eos", "unk", "pad")


def files(tokenizer: Tokenizer, backend: Backend) -> dict[str, bytes]:
    """backend: the same tokenizer in the `tokenizers` library, but for what stands around a text."""
    backend = Backend.from_str(backend.to_str())
    backend.post_processor = _around(tokenizer)
    special = {f"{role}_token": tokenizer.named(role) for role in ROLES if role in tokenizer.named_ids}
    config = special | {
        "add_bos_token": bool(tokenizer.prefix),
        "add_eos_token": bool(tokenizer.suffix),
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    written = {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(special),
    }
    if tokenizer.chat_template is not None:
        written["chat_template.jinja"] = tokenizer.chat_template.encode()
    return written


def piece_files(tokenizer: Tokenizer, model: proto.Model) -> dict[str, bytes]:
    """The files of a sentencepiece BPE tokenizer, tokenizer.model among them."""
    spelled = [(t.replace(" ", SPACE) if k == Kind.USER_DEFINED else t, score, k) for t, score, k in model.pieces]
    raw = proto.write(replace(model, pieces=spelled))
    return files(tokenizer, _backend(tokenizer.vocabulary, model)) | {"tokenizer.model": raw}


def added_tokens(vocabulary: Vocabulary) -> list[AddedToken]:
    """The tokens that are looked for in text whole, in the order of their ids."""
    matched = vocabulary.matched().items()
    return [AddedToken(text, special=id in vocabulary.special, normalized=False) for text, id in matched]


def _around(tokenizer: Tokenizer) -> processors.TemplateProcessing:
    texts = tokenizer.vocabulary.texts
    before, after = [texts[id] for id in tokenizer.prefix], [texts[id] for id in tokenizer.suffix]
    ids = {texts[id]: id for id in (*tokenizer.prefix, *tokenizer.suffix)}
    pair = [f"{token}:1" for token in (*before, "$B", *after)]
    return processors.TemplateProcessing(
        single=[*before, "$A", *after], pair=[*before, "$A", *after, *pair], special_tokens=list(ids.items())
    )


def _backend(vocabulary: Vocabulary, model: proto.Model) -> Backend:
    unknown = vocabulary.texts[model.unk_id] if model.unk_id >= 0 else None
    bpe = models.BPE(
        vocabulary.ids, _merges(model), unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback
    )
    backend = Backend(bpe)
    prepend = [normalizers.Prepend(SPACE)] if model.dummy_prefix else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    backend.decoder = piece_decoder(model.dummy_prefix)
    backend.add_tokens(added_tokens(vocabulary))
    return backend


def piece_decoder(spaced: bool) -> decoders.Decoder:
    """sentencepiece's spelling into text. spaced: without the space that was put in front."""
    strip = [decoders.Strip(" ", 1, 0)] if spaced else []
    return decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])


def _merges(model: proto.Model) -> list[tuple[str, str]]:
    """sentencepiece joins any two pieces that make a piece, the best score first; here the pairs must be listed."""
    scores = {text: score for text, score, kind in model.pieces if kind == Kind.NORMAL}
    return [
        (text[:cut], text[cut:])
        for text in sorted(scores, key=lambda text: -scores[text])
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
