"""A tokenizer as the files of a Hugging Face folder, such that transformers gives the same ids."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as Backend

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


def piece_files(tokenizer: Tokenizer, model: bytes, scores: Sequence[float], spaced: bool) -> dict[str, bytes]:
    """The files of a sentencepiece BPE tokenizer. model: tokenizer.model. spaced: a space is put in front of texts."""
    return files(tokenizer, _backend(tokenizer, scores, spaced)) | {"tokenizer.model": model}


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


def _backend(tokenizer: Tokenizer, scores: Sequence[float], spaced: bool) -> Backend:
    vocabulary = tokenizer.vocabulary
    model = models.BPE(
        vocabulary.ids,
        _merges(vocabulary, scores),
        unk_token=tokenizer.named("unk") or None,
        fuse_unk=True,
        byte_fallback=Kind.BYTE in vocabulary.kinds,
    )
    backend = Backend(model)
    prepend = [normalizers.Prepend(SPACE)] if spaced else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if spaced else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    backend.add_tokens(added_tokens(vocabulary))
    return backend


def _merges(vocabulary: Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """sentencepiece joins any two pieces that make a piece, the best score first; here the pairs must be listed."""
    ids = {text: id for id, text in enumerate(vocabulary.texts) if vocabulary.kinds[id] == Kind.NORMAL}
    best_first = sorted(ids, key=lambda text: -scores[ids[text]])
    return [
        (text[:cut], text[cut:])
        for text in best_first
        for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
