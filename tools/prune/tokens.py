"""A tokenizer with fewer tokens: which must stay for it to work at all, what else a token needs, the files rewritten.

A token of byte-pair encoding is reached through others: the merges that make it up must stay with it; one of Unigram
stands alone. Text whose tokens all stay is then cut as it was; any other text falls into smaller pieces, at worst into
bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from ...errors import BadFile, Unsupported
from ...runtime.tokenizer import Kind, Tokenizer, proto
from ...runtime.tokenizer.vocabulary import BYTE_ALPHABET, is_byte

STALE = ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")  # what tokenizer.json says as well
ROLES = ("_token_id", "_token_ids")  # how keys end that name tokens a model can't do without
SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
HINT = "Keep this model's vocabulary, and prune something else."

Files = Mapping[str, bytes]


class Encoding:
    """How a tokenizer makes tokens. texts: of the model's own tokens, by id."""

    texts: dict[int, str]

    def needs(self, id: int) -> set[int]:
        """The token and those that it is made through; of one that nothing reaches, itself."""
        return {id}

    def letters(self) -> Iterator[int]:
        """What everything can be spelled with: a token for each byte, or each character, and the unknown one."""
        bytewise = BYTE_ALPHABET.keys() <= set(self.texts.values()) or any(map(is_byte, self.texts.values()))
        for id, text in self.texts.items():
            if text == self._unknown() or is_byte(text) or (text in BYTE_ALPHABET if bytewise else len(text) == 1):
                yield id

    def _unknown(self) -> str | None:
        raise NotImplementedError

    def cut(self, new: Mapping[int, int]) -> dict[str, bytes]:
        """The files that say so, for the tokens whose new ids are in `new`."""
        raise NotImplementedError


class Described(Encoding):
    """That of a tokenizer.json, `data`."""

    def __init__(self, data: dict[str, Any]):
        self.data = data

    def cut(self, new: Mapping[int, int]) -> dict[str, bytes]:
        data = dict(self.data)
        data["model"] = data["model"] | self._model(new)
        added = data.get("added_tokens") or []
        data["added_tokens"] = [token | {"id": new[token["id"]]} for token in added if token["id"] in new]
        data["post_processor"] = _renumbered(data.get("post_processor"), new)
        if data.get("padding"):
            data["padding"] = data["padding"] | {"pad_id": new.get(data["padding"].get("pad_id"), 0)}
        return {"tokenizer.json": json.dumps(data, ensure_ascii=False).encode()}

    def _model(self, new: Mapping[int, int]) -> dict[str, Any]:
        raise NotImplementedError


class Merges(Described):
    """Byte-pair encoding: its vocabulary, its rules in order, and how each token is reached (Sennrich et al. 2016)."""

    def __init__(self, data: dict[str, Any]):
        super().__init__(data)
        model = data["model"]
        self.vocab: dict[str, int] = model["vocab"]
        self.rules = [tuple(rule.split(" ", 1)) if isinstance(rule, str) else tuple(rule) for rule in model["merges"]]
        self.ranks = {rule: rank for rank, rule in enumerate(self.rules)}
        self.texts = {id: text for text, id in self.vocab.items()}

    def needs(self, id: int) -> set[int]:
        return _merged(id, self.texts.get(id), self.vocab, self.ranks.get)

    def _unknown(self) -> str | None:
        return self.data["model"].get("unk_token")

    def _model(self, new: Mapping[int, int]) -> dict[str, Any]:
        """Every rule stays that makes one of the tokens that stay out of two of them."""
        vocab = {text: new[id] for text, id in self.vocab.items() if id in new}
        rules = [pair for pair in self.rules if "".join(pair) in vocab and pair[0] in vocab and pair[1] in vocab]
        return {"vocab": dict(sorted(vocab.items(), key=lambda item: item[1])), "merges": rules}


class Unigram(Described):
    """Tokens with scores; a text's best way through them counts (Kudo 2018), whatever others there are."""

    def __init__(self, data: dict[str, Any]):
        super().__init__(data)
        self.texts = {id: text for id, (text, _) in enumerate(data["model"]["vocab"])}

    def _unknown(self) -> str | None:
        return self.texts.get(self.data["model"].get("unk_id"))

    def _model(self, new: Mapping[int, int]) -> dict[str, Any]:
        """Tokens are numbered by their places, so those that were added may not come between."""
        model = self.data["model"]
        return {"vocab": [model["vocab"][id] for id in self.texts if id in new], "unk_id": new.get(model.get("unk_id"))}


class Pieces(Encoding):
    """sentencepiece's, of a folder that has a tokenizer.model alone: byte pairs by their scores, or Unigram."""

    def __init__(self, files: Files):
        self.files, self.model = files, proto.read(files["tokenizer.model"])
        self.texts = {id: text for id, (text, _, _) in enumerate(self.model.pieces)}
        self.normal = {text: id for id, (text, _, kind) in enumerate(self.model.pieces) if kind == Kind.NORMAL}

    def needs(self, id: int) -> set[int]:
        if self.model.type != proto.BPE or self.texts.get(id) not in self.normal:
            return {id}
        return _merged(id, self.texts[id], self.normal, self._rank)

    def _rank(self, pair: tuple[str, str]) -> float | None:
        made = self.normal.get(pair[0] + pair[1])
        return None if made is None else -self.model.pieces[made][1]

    def _unknown(self) -> str | None:
        return self.texts.get(self.model.unk_id)

    def cut(self, new: Mapping[int, int]) -> dict[str, bytes]:
        made = {"tokenizer.model": proto.cut(self.files["tokenizer.model"], [id for id in self.texts if id in new])}
        if added := _object(self.files, "added_tokens.json"):
            made["added_tokens.json"] = json.dumps({text: new[id] for text, id in added.items() if id in new}).encode()
        return made


def encoding(files: Files) -> Encoding:
    """That of a model's files. Raises Unsupported for one that can't be cut, BadFile for one that is damaged."""
    if "tokenizer.json" not in files and "tokenizer.model" in files:
        return Pieces(files)
    data = _object(files, "tokenizer.json")
    model = data.get("model") or {}
    kind = model.get("type", "BPE")
    if kind == "BPE" and isinstance(model.get("vocab"), dict):
        return Merges(data)
    if kind == "Unigram" and isinstance(model.get("vocab"), list):
        return Unigram(data)
    raise Unsupported(f"This tokenizer is of the kind {kind!r:.40}; BPE and Unigram alone can be cut.", HINT)


def _merged(id: int, text: str | None, vocab: Mapping[str, int], rank: Callable[[Any], float | None]) -> set[int]:
    """The token and those that merging, the least rank first, makes on the way from its letters to it."""
    parts, used = list(text or ""), {id}
    while len(parts) > 1:
        ranked = [(found, at) for at, pair in enumerate(pairwise(parts)) if (found := rank(pair)) is not None]
        if not ranked:
            return {id}
        at = min(ranked)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        used.add(vocab.get(parts[at], id))
    return used | {vocab[letter] for letter in text or "" if letter in vocab}


def required(how: Encoding, tokenizer: Tokenizer, files: Files, config: Mapping[str, Any]) -> set[int]:
    """Tokens that no choice may drop: bytes, special tokens, those that some file names, those of the template."""
    needed = {*how.letters(), *tokenizer.special_ids, *tokenizer.prefix, *tokenizer.suffix, *tokenizer.eos_ids}
    needed |= set(tokenizer.named_ids.values())
    for named in (config, _object(files, "generation_config.json")):
        needed |= {id for key in named if key.endswith(ROLES) for id in _listed(named[key])}
    template = tokenizer.chat_template or ""
    spoken = {*tokenizer.encode(template, add_special=False)} if template else set()
    needed |= {id for id in spoken if id not in how.texts}  # added tokens that the template writes
    roles = [text for role in ("system", "user", "assistant", "tool") for text in (role, f" {role}", f"{role}\n")]
    needed |= {id for text in roles for id in tokenizer.encode(text, add_special=False)}
    return closed(how, (id for id in needed if 0 <= id < tokenizer.vocab_size))


def closed(how: Encoding, ids: Iterable[int]) -> set[int]:
    """With all that they are made through."""
    return set().union(*(how.needs(id) for id in ids))


def rewritten(how: Encoding, files: Files, kept: np.ndarray) -> dict[str, bytes]:
    """The side files of a model that keeps the tokens `kept` (old ids, ascending), which are now 0, 1, 2, …"""
    new = {int(id): at for at, id in enumerate(kept)}
    made = {name: content for name, content in files.items() if name not in STALE and not name.endswith(".tiktoken")}
    made |= how.cut(new)
    for name, rewrite in (("tokenizer_config.json", _added_tokens), ("generation_config.json", renamed_ids)):
        if name in files:
            made[name] = (json.dumps(rewrite(_object(files, name), new), indent=2, ensure_ascii=False) + "\n").encode()
    return made


def renamed_ids(config: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """A config.json or generation_config.json with its token ids in the new numbering; tokens that it only keeps from
    being said vanish with the vocabulary."""
    names_ids = {key for key in config if key.endswith(ROLES) or key in SUPPRESSED}
    return {key: _renamed(value, new) if key in names_ids else value for key, value in config.items()}


def _listed(value: Any) -> list[int]:
    """The ids in a value, however deep."""
    if isinstance(value, list):
        return [id for part in value for id in _listed(part)]
    return [value] if type(value) is int else []


def _renamed(value: Any, new: Mapping[int, int]) -> Any:
    if isinstance(value, list):
        return [_renamed(part, new) for part in value if all(id in new for id in _listed(part))]
    return new.get(value, value) if type(value) is int else value


def _renumbered(step: Any, new: Mapping[int, int]) -> Any:
    """A post-processor, or a sequence of them: the ids of what it puts around a text."""
    if not isinstance(step, dict):
        return step
    made = dict(step)
    if isinstance(step.get("processors"), list):
        made["processors"] = [_renumbered(each, new) for each in step["processors"]]
    if isinstance(step.get("special_tokens"), dict):
        special = step["special_tokens"].items()
        made["special_tokens"] = {name: token | {"ids": [new[id] for id in token["ids"]]} for name, token in special}
    for role in ("sep", "cls"):
        if isinstance(step.get(role), list):
            made[role] = [step[role][0], new[step[role][1]]]
    return made


def _added_tokens(config: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    listed = config.get("added_tokens_decoder")
    if not isinstance(listed, dict):
        return dict(config)
    return {**config, "added_tokens_decoder": {str(new[int(id)]): t for id, t in listed.items() if int(id) in new}}


def _object(files: Files, name: str) -> dict[str, Any]:
    if name not in files:
        if name != "tokenizer.json":
            return {}
        raise Unsupported("This model has no tokenizer whose vocabulary could be cut.", HINT)
    try:
        found = json.loads(files[name])
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise BadFile(f"{name} is not a JSON object.", "Fetch the model again, with its tokenizer files.")
    return found
