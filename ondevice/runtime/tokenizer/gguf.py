"""The tokenizer inside a GGUF file, with the ids that llama.cpp gives.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import partial
from typing import Any

from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from ...errors import BadFile, Unsupported
from .bpe import BpeEngine, told
from .first import FirstTexts
from .pretokenizers import PreTokenizer, pretokenizer
from .tokenizer import Tokenizer
from .vocabulary import BYTE_ALPHABET, ENDS, Kind, Vocabulary

HINT = "Download or convert the GGUF again."


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Raises BadFile for what is missing or doesn't add up, Unsupported for a kind that isn't known here."""
    keys = Keys(metadata)
    model = keys.get("model", str)
    if model in (None, "none", "no_vocab"):
        raise BadFile("The GGUF has no tokenizer.", "Take a GGUF of the whole model.")
    if model == "gpt2":
        return _byte_level(keys)
    if model == "llama":
        return _sentencepiece(keys)
    raise Unsupported(f"The GGUF's tokenizer is of the kind {model!r}.", "Known kinds: gpt2 (byte-level BPE), llama.")


class Keys:
    """The GGUF's tokenizer.ggml.… keys, their types checked as they are read."""

    def __init__(self, metadata: Mapping[str, Any]):
        self._metadata = metadata

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._metadata.get(key if "." in key else f"tokenizer.ggml.{key}", default)
        if value is not default and type(value) is not kind:
            raise BadFile(f"The GGUF's tokenizer has {key} as {type(value).__name__}, not {kind.__name__}.", HINT)
        return value

    def list(self, key: str, *kinds: type) -> list:
        """A list of values of `kinds`; empty where there is none."""
        values = self.get(key, list, [])
        if not set(map(type, values)) <= set(kinds):
            raise BadFile(f"The GGUF's tokenizer has something else in {key} than {kinds[0].__name__}.", HINT)
        return values

    def id(self, name: str, vocabulary: Vocabulary, default: int | None = None) -> int | None:
        """A special token's id, None where the file names none."""
        id = self.get(f"{name}_token_id", int, default)
        if id is not None and not 0 <= id < len(vocabulary):
            raise BadFile(f"The GGUF's {name} token is {id}, but there are {len(vocabulary)} tokens.", HINT)
        return id


def _vocabulary(keys: Keys, byte_level: bool) -> Vocabulary:
    texts = keys.list("tokens", str)
    kinds = keys.list("token_type", int) or [int(Kind.NORMAL)] * len(texts)
    if not texts or len(kinds) != len(texts):
        raise BadFile(f"The GGUF's tokenizer has {len(texts)} tokens and {len(kinds)} types of tokens.", HINT)
    if "" in texts:
        texts = [text or f"[EMPTY_{id}]" for id, text in enumerate(texts)]  # as llama.cpp calls them
    vocabulary = Vocabulary(texts, list(kinds), byte_level)
    if len(vocabulary.ids) != len(texts):
        raise BadFile("The GGUF's tokenizer has the same token twice.", HINT)
    for text in ENDS & vocabulary.ids.keys():  # many a converter forgets that these are special; llama.cpp corrects it
        vocabulary.kinds[vocabulary.ids[text]] = Kind.CONTROL
    return vocabulary


def _facts(keys: Keys, vocabulary: Vocabulary, add_bos: bool, defaults: Mapping[str, int]) -> dict[str, Any]:
    """What a Tokenizer needs besides its engine. add_bos, defaults: where the file doesn't say."""
    bos = keys.id("bos", vocabulary, defaults.get("bos"))
    eos = keys.id("eos", vocabulary, defaults.get("eos"))
    stops = {eos, keys.id("eot", vocabulary), keys.id("eom", vocabulary)} - {None}
    around = {
        "bos": (bos, keys.get("add_bos_token", bool, add_bos)),
        "eos": (eos, keys.get("add_eos_token", bool, False)),
    }
    for name, (id, wanted) in around.items():
        if wanted and id is None:
            raise BadFile(f"The GGUF's tokenizer puts a {name} token around texts, but names none.", HINT)
    prefix, suffix = ((id,) if wanted else () for id, wanted in around.values())
    ids = {"bos": bos, "eos": eos, "unk": keys.id("unknown", vocabulary, defaults.get("unk"))}
    ids["pad"] = keys.id("padding", vocabulary)
    return {
        "prefix": prefix,
        "suffix": suffix,
        "named_ids": {role: id for role, id in ids.items() if id is not None},
        "eos_ids": vocabulary.ends() | stops,
        "chat_template": keys.get("tokenizer.chat_template", str),
    }


# ------------------------------------------------------------------------------------------- byte-level BPE


def _byte_level(keys: Keys) -> Tokenizer:
    name = keys.get("pre", str)
    if name is None:
        raise BadFile(
            "The GGUF does not say how its tokenizer cuts text into words (tokenizer.ggml.pre).",
            "It is from an old converter, and guessing spoils answers: take a newer GGUF of the model.",
        )
    rule, vocabulary = pretokenizer(name), _vocabulary(keys, byte_level=True)
    merges = keys.list("merges", str)
    if not merges or set(map(operator.methodcaller("count", " "), merges)) != {1}:
        raise BadFile("The GGUF's tokenizer has no merges, or something else among them.", HINT)
    index = partial(_indexed, merges, rule, vocabulary)
    engine = FirstTexts(word_steps(rule, vocabulary), vocabulary, merges, rule.ignore_merges, index)
    return Tokenizer(engine, vocabulary, write=_files, **_facts(keys, vocabulary, rule.add_bos, {}))


def _files(tokenizer: Tokenizer) -> dict[str, bytes]:
    from .export import files

    return files(tokenizer, tokenizer.engine.indexed.backend)


def _indexed(merges: list[str], rule: PreTokenizer, vocabulary: Vocabulary) -> BpeEngine:
    from .export import added_tokens

    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    with told(lambda what: BadFile(f"The GGUF's merges do not fit its tokens: {what}.", HINT)):
        model = models.BPE(vocabulary.ids, pairs, ignore_merges=rule.ignore_merges)
    backend = Backend(model)
    backend.pre_tokenizer = word_steps(rule, vocabulary)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(added_tokens(vocabulary))
    return BpeEngine(backend)


def word_steps(rule: PreTokenizer, vocabulary: Vocabulary | None) -> pre_tokenizers.Sequence:
    """Text into words in GPT-2's byte alphabet, by a rule; without the bytes that a vocabulary can't spell."""
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in rule.expressions]
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, spell, *(_without_missing(vocabulary) if vocabulary else [])])


def _without_missing(vocabulary: Vocabulary) -> list[pre_tokenizers.PreTokenizer]:
    """Bytes that the vocabulary can't spell (SmolLM2 lacks some control characters) are left out, as llama.cpp does,
    and what stands around them is not joined."""
    missing = [letter for letter in BYTE_ALPHABET if letter not in vocabulary.ids]
    letters = "".join(f"\\x{{{ord(letter):X}}}" for letter in missing)
    return [pre_tokenizers.Split(Regex(f"[{letters}]"), "removed")] if missing else []


# --------------------------------------------------------------------------------------------- sentencepiece


def _sentencepiece(keys: Keys) -> Tokenizer:
    from . import export, proto
    from .pieces import Match, PieceEngine

    vocabulary, scores = _vocabulary(keys, byte_level=False), keys.list("scores", float, int)
    if len(scores) != len(vocabulary):
        raise BadFile(f"The GGUF's tokenizer has {len(vocabulary)} tokens and {len(scores)} scores.", HINT)
    facts = _facts(keys, vocabulary, True, {"bos": 1, "eos": 2, "unk": 0})
    spaced = keys.get("add_space_prefix", bool, True)
    ids = {f"{role}_id": facts["named_ids"].get(role, -1) for role in ("unk", "bos", "eos", "pad")}
    pieces = list(zip(vocabulary.texts, scores, vocabulary.kinds, strict=True))
    model = proto.Model(pieces, byte_fallback=Kind.BYTE in vocabulary.kinds, dummy_prefix=spaced, **ids)
    matches = [Match(text, id, id in vocabulary.special) for text, id in vocabulary.matched().items()]
    prefix = "always" if spaced else "never"
    try:
        engine = PieceEngine(proto.write(model), matches, prefix, doubles=True)
    except (RuntimeError, ValueError) as error:
        raise BadFile(f"The GGUF's tokenizer does not add up: {error}.", HINT) from None
    write = partial(export.piece_files, model=model)
    return Tokenizer(engine, vocabulary, drops_space=spaced, write=write, **facts)
