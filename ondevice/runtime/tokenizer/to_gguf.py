"""A Hugging Face folder's tokenizer as GGUF's keys, such that llama.cpp gives the same ids.

How text is cut into words (`tokenizer.ggml.pre`) is a name in GGUF and a program in tokenizer.json: the name is found
by letting both cut the same text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend

from ...checkpoint.files import damaged
from ...errors import BadFile, Unsupported
from . import proto
from .bpe import BpeEngine
from .folder import HINT, from_folder
from .gguf import from_gguf, word_steps
from .pretokenizers import RULES, PreTokenizer
from .tokenizer import Tokenizer
from .vocabulary import Kind, Vocabulary

NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # role -> GGUF's word for it
ADDED_SCORE = -1000.0  # of tokens that sentencepiece's own merging must never make, as llama.cpp's converter gives it

USUAL = {"llama3": "llama-bpe"}  # what llama.cpp's converter calls a rule
LETTERS = "a e s t v L D R M S T é ß 中 文 か カ 한 א ع क 1 2 9 ٣ ² ½".split()
MARKS = [*" .,;:!?'’\"`-_/\\|()[]{}<>=+*&^%$#@~。、！€→🙂", *"\n \t \r\n \n\n".split(" "), "  ", "    "]
MARKS += ["'s", "'LL", "'Re", "'t", "123456"]
WORDS = (
    "It's  the 1st of   2,345 things:\n\n\tdef f(x_1): return x**2  # don't\r\n  I'LL we'Ve they'RE 12345.6789e-10 "
    "https://example.org/a/b?c=d&e=f naïve Straße 中文字 かな カナ 한국어 עברית العربية हिन्दी 🙂🙃 "
    "… “quoted”—dash\n \n  end "
)


def gguf_tokenizer(folder: Path, vocab: int) -> dict[str, Any]:
    """`tokenizer.…` keys and values for a model of `vocab` token ids.

    Tokens that were added beyond those (Gemma 3's of 1B has one for pictures) are left out, as llama.cpp's converter
    does. Raises Unsupported for a tokenizer that llama.cpp has no like of, BadFile for one that is damaged or larger
    than the model.
    """
    tokenizer = _within(folder, from_folder(folder), vocab)
    described = _byte_level if tokenizer.vocabulary.byte_level else _sentencepiece
    keys = described(folder, tokenizer, vocab) | _facts(tokenizer)
    _check(folder, tokenizer, keys)
    return keys


def _within(folder: Path, tokenizer: Tokenizer, vocab: int) -> Tokenizer:
    """Without the tokens that the model does not know."""
    held = tokenizer.vocabulary
    if not set(held.kinds[vocab:]) <= {Kind.CONTROL, Kind.USER_DEFINED}:
        raise BadFile(f"{folder} has {len(held)} tokens, but its model knows {vocab}.", HINT)
    named = {role: id for role, id in tokenizer.named_ids.items() if id < vocab}
    kept = Vocabulary(held.texts[:vocab], held.kinds[:vocab], held.byte_level)
    return replace(tokenizer, vocabulary=kept, named_ids=named)


def _facts(tokenizer: Tokenizer) -> dict[str, Any]:
    keys: dict[str, Any] = {
        f"tokenizer.ggml.{name}_token_id": tokenizer.named_ids[role]
        for role, name in NAMES.items()
        if role in tokenizer.named_ids
    }
    keys["tokenizer.ggml.add_bos_token"] = bool(tokenizer.prefix)
    if tokenizer.suffix:
        keys["tokenizer.ggml.add_eos_token"] = True
    keys["tokenizer.ggml.add_space_prefix"] = tokenizer.drops_space
    return keys | ({"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {})


def _tokens(vocabulary: Vocabulary, vocab: int) -> tuple[list[str], list[int]]:
    """Texts and kinds for every id of the model; ids without a token get a text that nothing spells."""
    texts, kinds = list(vocabulary.texts), list(map(int, vocabulary.kinds))
    for id in range(vocab):
        unused = f"[PAD{id}]"
        if id >= len(texts):
            texts.append(unused)
            kinds.append(int(Kind.UNUSED))
        elif texts[id] in ("", unused):
            texts[id], kinds[id] = unused, int(Kind.UNUSED)
    return texts, kinds


# ------------------------------------------------------------------------------------------- byte-level BPE


def _byte_level(folder: Path, tokenizer: Tokenizer, vocab: int) -> dict[str, Any]:
    backend = _backend(folder, tokenizer)
    texts, kinds = _tokens(tokenizer.vocabulary, vocab)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre(folder, backend, tokenizer.vocabulary),
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in _merges(folder, backend)],
    }


def _backend(folder: Path, tokenizer: Tokenizer) -> Backend:
    if not isinstance(tokenizer.engine, BpeEngine):
        raise Unsupported(f"{folder} has no tokenizer.json.", "Save it with transformers' save_pretrained.")
    return tokenizer.engine.backend


def _model(folder: Path, backend: Backend) -> Mapping[str, Any]:
    model = json.loads(backend.to_str())["model"]
    if model.get("type") != "BPE":
        raise Unsupported(
            f"{folder} has a tokenizer of the kind {model.get('type')!r:.40}, which GGUF has no place for here.",
            "Known kinds: byte-level BPE, sentencepiece BPE.",
        )
    return model


def _merges(folder: Path, backend: Backend) -> list[tuple[str, str]]:
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in _model(folder, backend)["merges"]]
    return [(left, right) for left, right in merges]


def _pre(folder: Path, backend: Backend, vocabulary: Vocabulary) -> str:
    """The name of the rule that cuts as this tokenizer does; in letters whose case llama.cpp cannot tell, nearly."""
    ignore_merges, sample = bool(_model(folder, backend).get("ignore_merges")), probe()
    wanted = _words(backend, sample)
    for rule, names in RULES.items():
        if rule.ignore_merges == ignore_merges and wanted in (
            _words(_cutting(rule, None), sample), _words(_cutting(rule, vocabulary), sample),
        ):  # fmt: skip
            return USUAL.get(names.split()[0], names.split()[0])
    raise Unsupported(
        f"{folder} cuts text into words as no tokenizer does that llama.cpp knows.",
        "A GGUF of it would give other ids than the model was trained on: keep it as a folder.",
    )


def _cutting(rule: PreTokenizer, vocabulary: Vocabulary | None) -> Backend:
    from tokenizers import models

    backend = Backend(models.BPE())
    backend.pre_tokenizer = word_steps(rule, vocabulary)
    return backend


def _words(backend: Backend, text: str) -> list[str]:
    step = backend.pre_tokenizer
    return [word for word, _ in step.pre_tokenize_str(text)] if step else [text]


def probe() -> str:
    """A text in which every rule cuts somewhere that no other does: words, and letters and marks drawn at random."""
    draw = np.random.default_rng(0)
    pool = LETTERS * 2 + MARKS
    return WORDS + "".join(pool[i] for i in draw.integers(len(pool), size=6000))


# --------------------------------------------------------------------------------------------- sentencepiece


def _sentencepiece(folder: Path, tokenizer: Tokenizer, vocab: int) -> dict[str, Any]:
    texts, kinds = _tokens(tokenizer.vocabulary, vocab)
    pieces = _pieces(folder)
    if pieces:
        scores = {text: score for text, score, _ in pieces}
        special = {Kind.UNKNOWN, Kind.CONTROL, Kind.UNUSED}
        kinds = [
            kind_there if id < len(pieces) and (kind_there := pieces[id][2]) in special else kind
            for id, kind in enumerate(kinds)
        ]
    else:
        scores = _ranks(_merges(folder, _backend(folder, tokenizer)))
        scores |= {text: 0.0 for text, kind in zip(texts, kinds, strict=True) if kind == Kind.BYTE}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": [float(scores.get(text, ADDED_SCORE)) for text in texts],
        "tokenizer.ggml.token_type": kinds,
    }


def _pieces(folder: Path) -> list[tuple[str, float, int]]:
    """Text, score and kind by id out of tokenizer.model; [] where there is none."""
    path = folder / "tokenizer.model"
    if not path.is_file():
        return []
    try:
        model = proto.read(path.read_bytes())
    except ValueError as error:
        raise damaged(path, str(error), HINT) from None
    if model.type != proto.BPE:
        raise Unsupported(
            f"{path} is not a BPE model, and GGUF has no place for others here.", "Keep the model as a folder."
        )
    return list(model.pieces)


def _ranks(merges: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Scores that make llama.cpp join the same pairs first: minus the rank of the merge that makes a piece."""
    scores: dict[str, float] = {}
    for rank, pair in enumerate(merges):
        scores.setdefault("".join(pair), -float(rank))
        for part in pair:
            scores.setdefault(part, -1e6)  # a letter of the alphabet, or a piece whose own merge comes later
    return scores


# ------------------------------------------------------------------------------------------------- the proof


def _check(folder: Path, tokenizer: Tokenizer, keys: Mapping[str, Any]) -> None:
    """Raises Unsupported where these keys, read as llama.cpp reads them, cut a text into other ids."""
    back, sample = from_gguf(keys), probe()
    for text in [WORDS, *(sample[at : at + 40].lstrip() for at in range(0, len(sample), 40))]:
        if back.encode(text, parse_special=False) != tokenizer.encode(text, parse_special=False):
            raise Unsupported(
                f"{folder}: as a GGUF its tokenizer would cut {text[:40]!r} into other ids.",
                "Keep the model as a folder: --to hf or --to mlx.",
            )
