"""A tokenizer with fewer tokens: which must stay for it to work at all, what else a token needs, the files rewritten.

A token of byte-pair encoding is reached through others: the merges that make it up must stay with it. Text whose tokens
all stay is then cut as it was; any other text falls into smaller pieces, at worst into bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from ...errors import BadFile, Unsupported
from ...runtime.tokenizer import Tokenizer
from ...runtime.tokenizer.vocabulary import BYTE_ALPHABET, is_byte

STALE = ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")  # what tokenizer.json says as well
ROLES = ("_token_id", "_token_ids")  # how keys end that name tokens a model can't do without
SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
HINT = "Keep this model's vocabulary, and prune something else."

Files = Mapping[str, bytes]


class Merges:
    """The byte-pair encoding of a tokenizer.json: its vocabulary, its rules in order, and how each token is reached."""

    def __init__(self, files: Files):
        self.data = _object(files, "tokenizer.json")
        model = self.data.get("model") or {}
        if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
            raise Unsupported(
                f"This tokenizer is of the kind {model.get('type', 'unknown')!r}; only byte-pair encodings can be cut.",
                HINT,
            )
        self.vocab: dict[str, int] = model["vocab"]
        self.rules = [tuple(rule.split(" ", 1)) if isinstance(rule, str) else tuple(rule) for rule in model["merges"]]
        self.ranks = {rule: rank for rank, rule in enumerate(self.rules)}
        self.added: dict[str, dict] = {token["content"]: token for token in self.data.get("added_tokens") or []}
        self.texts = {id: text for text, id in self.vocab.items()}

    def needs(self, id: int) -> set[int]:
        """The token and those that it is made through; of one that merges never reach, itself."""
        text = self.texts.get(id)
        if text is None:
            return {id}
        parts, used = list(text), {id}
        while len(parts) > 1:
            pairs = [(self.ranks.get(pair, len(self.rules)), at) for at, pair in enumerate(pairwise(parts))]
            rank, at = min(pairs)
            if rank == len(self.rules):
                return {id}
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            used.add(self.vocab.get(parts[at], id))
        return used | {self.vocab[letter] for letter in text if letter in self.vocab}

    def letters(self) -> Iterator[int]:
        """What everything can be spelled with: a token for each byte, or each character, and the unknown one."""
        unknown = self.data["model"].get("unk_token")
        for text, id in self.vocab.items():
            if text in BYTE_ALPHABET or is_byte(text) or text == unknown:
                yield id


def required(merges: Merges, tokenizer: Tokenizer, files: Files, config: Mapping[str, Any]) -> set[int]:
    """Tokens that no choice may drop: bytes, special tokens, those that some file names, those of the template."""
    needed = {*merges.letters(), *tokenizer.special_ids, *tokenizer.prefix, *tokenizer.suffix, *tokenizer.eos_ids}
    needed |= set(tokenizer.named_ids.values())
    for named in (config, _object(files, "generation_config.json")):
        needed |= {id for key in named if key.endswith(ROLES) for id in _listed(named[key])}
    template = tokenizer.chat_template or ""
    spoken = {*tokenizer.encode(template, add_special=False)} if template else set()
    needed |= {id for id in spoken if id not in merges.texts}  # added tokens that the template writes
    roles = [text for role in ("system", "user", "assistant", "tool") for text in (role, f" {role}", f"{role}\n")]
    needed |= {id for text in roles for id in tokenizer.encode(text, add_special=False)}
    return closed(merges, (id for id in needed if 0 <= id < tokenizer.vocab_size))


def closed(merges: Merges, ids: Iterable[int]) -> set[int]:
    """With all that they are made through."""
    return set().union(*(merges.needs(id) for id in ids))


def rewritten(merges: Merges, files: Files, kept: np.ndarray) -> dict[str, bytes]:
    """The side files of a model that keeps the tokens `kept` (old ids, ascending), which are now 0, 1, 2, …"""
    new = {int(id): at for at, id in enumerate(kept)}
    made = {name: content for name, content in files.items() if name not in STALE and not name.endswith(".tiktoken")}
    made["tokenizer.json"] = json.dumps(_tokenizer(merges, new), ensure_ascii=False).encode()
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


def _tokenizer(merges: Merges, new: Mapping[int, int]) -> dict[str, Any]:
    """tokenizer.json with the tokens that stay, and every rule that makes one of them out of two of them."""
    data, model = dict(merges.data), dict(merges.data["model"])
    vocab = {text: new[id] for text, id in merges.vocab.items() if id in new}
    rules = [pair for pair in merges.rules if "".join(pair) in vocab and pair[0] in vocab and pair[1] in vocab]
    data["model"] = model | {"vocab": dict(sorted(vocab.items(), key=lambda item: item[1])), "merges": rules}
    added = data.get("added_tokens") or []
    data["added_tokens"] = [token | {"id": new[token["id"]]} for token in added if token["id"] in new]
    data["post_processor"] = _renumbered(data.get("post_processor"), new)
    if data.get("padding"):
        data["padding"] = data["padding"] | {"pad_id": new.get(data["padding"].get("pad_id"), 0)}
    return data


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
        raise Unsupported("This model has no tokenizer.json, whose vocabulary could be cut.", HINT)
    try:
        found = json.loads(files[name])
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise BadFile(f"{name} is not a JSON object.", "Fetch the model again, with its tokenizer files.")
    return found
