"""The tokenizer of a Hugging Face folder, with the ids that transformers gives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, pre_tokenizers
from tokenizers import Tokenizer as Backend

from ...checkpoint.files import damaged, read_object, unreadable
from ...errors import BadFile, Unsupported
from . import export, proto
from .bpe import HINT, BpeEngine, told
from .pieces import Match, PieceEngine
from .tokenizer import Tokenizer
from .vocabulary import SPACE, Kind, Vocabulary, is_byte

FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
MOST = 256 << 20  # bytes of one file
GAPS = 10_000  # ids without a token that are believed: there are some, but not a gigabyte of them


def from_folder(folder: Path) -> Tokenizer:
    """Raises BadFile where there is no tokenizer or a damaged one, Unsupported for a kind that isn't known here."""
    config = _config(folder)
    if (folder / "tokenizer.json").is_file():
        tokenizer = _from_json(folder / "tokenizer.json", config)
    elif (folder / "tokenizer.model").is_file():
        tokenizer = _from_model(folder / "tokenizer.model", config)
    else:
        raise BadFile(f"{folder} has neither tokenizer.json nor tokenizer.model.", HINT)
    tokenizer.eos_ids = _stops(folder, tokenizer)
    tokenizer.chat_template = _template(folder, config)
    tokenizer.write = lambda _: {name: _read(folder / name) for name in FILES if (folder / name).is_file()}
    return tokenizer


def _config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with what older folders say in files of their own."""
    found: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").is_file():
        found = read_object(folder / "tokenizer_config.json", MOST)
    if "added_tokens_decoder" in found:
        return found
    if (folder / "special_tokens_map.json").is_file():
        found |= read_object(folder / "special_tokens_map.json", MOST)
    if (folder / "added_tokens.json").is_file():
        special = {token.content for token in _special(found)}
        added = read_object(folder / "added_tokens.json", MOST)
        found["added_tokens_decoder"] = {id: {"content": t, "special": t in special} for t, id in added.items()}
    return found


def _token(value: Any, special: bool) -> AddedToken | None:
    """A token as the files write it: its text, or an object. None where there is none. special: unless it says so."""
    if isinstance(value, str) and value:
        return AddedToken(value, special=special, normalized=not special)
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), str) or not value["content"]:
        return None
    special = special or value.get("special") is True
    flags = {name: value.get(name) is True for name in ("lstrip", "rstrip", "single_word")}
    return AddedToken(
        value["content"], special=special, normalized=value.get("normalized", not special) is True, **flags
    )


def _named(config: Mapping[str, Any]) -> dict[str, AddedToken]:
    """The special tokens that have a role: bos, eos, …"""
    found = {key.removesuffix("_token"): _token(config[key], True) for key in config if key.endswith("_token")}
    return {role: token for role, token in found.items() if token is not None}


def _special(config: Mapping[str, Any]) -> list[AddedToken]:
    """Those, and the special tokens that have no role."""
    others = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    others = list(others.values()) if isinstance(others, Mapping) else others
    found = [_token(value, True) for value in others] if isinstance(others, list) else []
    return [*_named(config).values(), *(token for token in found if token is not None)]


def _added(path: Path, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """added_tokens_decoder, in the order of the ids."""
    listed = config.get("added_tokens_decoder") or {}
    try:
        found = {int(id): _token(value, False) for id, value in listed.items()}
    except (AttributeError, TypeError, ValueError):
        raise damaged(path, "added_tokens_decoder is no list of ids and tokens", HINT) from None
    return {id: found[id] for id in sorted(found) if found[id] is not None}


# -------------------------------------------------------------------------------------------- tokenizer.json


def _from_json(path: Path, config: Mapping[str, Any]) -> Tokenizer:
    with told(lambda what: damaged(path, what, HINT)):
        backend = Backend.from_buffer(_read(path))
        _add_tokens(backend, path, config)
        _as_llama(backend, config)
        engine = BpeEngine(backend)
    vocabulary, drops_space = _vocabulary(backend, path)
    named = {role: backend.token_to_id(token.content) for role, token in _named(config).items()}
    ids = {role: id for role, id in named.items() if id is not None}
    return Tokenizer(engine, vocabulary, *engine.added(), named_ids=ids, drops_space=drops_space)


def _add_tokens(backend: Backend, path: Path, config: Mapping[str, Any]) -> None:
    """What tokenizer_config.json names and tokenizer.json lacks; what it says of a token counts."""
    known = list(backend.get_added_tokens_decoder().values())
    backend.add_tokens([token for token in _added(path, config).values() if repr(token) not in set(map(repr, known))])
    texts = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_tokens([token for token in _special(config) if token.content not in texts])


def _as_llama(backend: Backend, config: Mapping[str, Any]) -> None:
    """transformers' LlamaTokenizer replaces how tokenizer.json puts a space in front: once, unless `legacy` is set."""
    if not _is_llama(config) or "ByteLevel" in _steps(backend):
        return
    spaced = config.get("add_prefix_space") is not False
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, _scheme(config) if spaced else "never", split=False)
    backend.decoder = export.piece_decoder(spaced)


def _is_llama(config: Mapping[str, Any]) -> bool:
    return str(config.get("tokenizer_class", "")).removesuffix("Fast") == "LlamaTokenizer"


def _scheme(config: Mapping[str, Any]) -> str:
    """Where a space is put in front: of the text, or after each special token as well, as older versions did."""
    return "always" if config.get("legacy") else "first"


def _steps(backend: Backend) -> dict[str, dict[str, Any]]:
    """What the decoder does, by the names of its steps."""
    if backend.decoder is None:
        return {}
    decoder = json.loads(backend.decoder.__getstate__())
    return {step["type"]: step for step in decoder.get("decoders", [decoder])}


def _vocabulary(backend: Backend, path: Path) -> tuple[Vocabulary, bool]:
    """And whether decoding drops a space at the beginning."""
    steps = _steps(backend)
    byte_level = "ByteLevel" in steps
    if not byte_level and (steps.keys() - {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} or not steps):
        what = ", ".join(steps) or "no decoder"
        raise Unsupported(f"{path} has a decoder that is not known here: {what}.", "Known: ByteLevel, Metaspace.")
    ids = backend.get_vocab(with_added_tokens=True)
    size = max(ids.values(), default=-1) + 1
    if size > 2 * len(ids) + GAPS:
        raise damaged(path, f"it has {len(ids)} tokens, but one with the id {size - 1}", HINT)
    texts = [""] * size
    for text, id in ids.items():
        texts[id] = text
    kinds = [Kind.BYTE if not byte_level and is_byte(text) else Kind.NORMAL for text in texts]
    for id, token in backend.get_added_tokens_decoder().items():
        kinds[id] = Kind.CONTROL if token.special else Kind.USER_DEFINED
    metaspace = steps.get("Metaspace", {"prepend_scheme": "never"})
    return Vocabulary(texts, kinds, byte_level), "Strip" in steps or metaspace["prepend_scheme"] != "never"


# ------------------------------------------------------------------------------------------- tokenizer.model


def _from_model(path: Path, config: Mapping[str, Any]) -> Tokenizer:
    raw = _read(path)
    try:
        model = proto.read(raw)
    except ValueError as error:
        raise damaged(path, str(error), HINT) from None
    added, named = _added(path, config), _named(config)
    vocabulary = _piece_vocabulary(model, added, {token.content for token in _special(config)})
    spaced = config.get("add_prefix_space") is not False and (model.dummy_prefix or _is_llama(config))
    flags = {id: (token.lstrip, token.rstrip) for id, token in added.items()}
    special = vocabulary.special
    matches = [Match(t, id, id in special, *flags.get(id, ())) for t, id in vocabulary.matched().items()]
    try:
        engine = PieceEngine(raw, matches, _scheme(config) if spaced else "never", doubles=False)
    except RuntimeError as error:
        raise damaged(path, str(error), HINT) from None
    roles = {"bos": model.bos_id, "eos": model.eos_id, "unk": model.unk_id, "pad": model.pad_id}
    ids = {role: id for role, id in roles.items() if 0 <= id < len(vocabulary)}
    known = vocabulary.ids
    ids |= {role: known[token.content] for role, token in named.items() if token.content in known}
    prefix = (ids["bos"],) if config.get("add_bos_token") and "bos" in ids else ()
    suffix = (ids["eos"],) if config.get("add_eos_token") and "eos" in ids else ()
    return Tokenizer(engine, vocabulary, prefix, suffix, ids, drops_space=spaced)


def _piece_vocabulary(model: proto.Model, added: Mapping[int, AddedToken], special: set[str]) -> Vocabulary:
    """The model's pieces, and the tokens added to them. special: those that are by what the other files say."""
    texts, kinds = [text for text, _, _ in model.pieces], [kind for _, _, kind in model.pieces]
    for id, token in added.items():
        if 0 <= id < 2 * len(model.pieces) + GAPS:
            missing = id + 1 - len(texts)
            texts, kinds = texts + [""] * missing, kinds + [int(Kind.UNUSED)] * missing
            texts[id], kinds[id] = token.content, Kind.CONTROL if token.special else Kind.USER_DEFINED
    named = {id for id, text in enumerate(texts) if text in special and kinds[id] != Kind.UNKNOWN}
    return Vocabulary(texts, [Kind.CONTROL if id in named else kind for id, kind in enumerate(kinds)], byte_level=False)


# ---------------------------------------------------------------------------------------------- other files


def _stops(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """Every token that ends an answer: named in either file, or known by its text."""
    path = folder / "generation_config.json"
    found = read_object(path, MOST).get("eos_token_id") if path.is_file() else None
    listed = found if isinstance(found, list) else [found, tokenizer.named_ids.get("eos")]
    stops = {id for id in (*listed, tokenizer.named_ids.get("eos")) if type(id) is int}
    return tokenizer.vocabulary.ends() | {id for id in stops if 0 <= id < tokenizer.vocab_size}


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """A file of its own goes before tokenizer_config.json; of several, the one called default."""
    if (folder / "chat_template.jinja").is_file():
        try:
            return _read(folder / "chat_template.jinja").decode()
        except UnicodeDecodeError:
            raise damaged(folder / "chat_template.jinja", "it is not UTF-8 text", HINT) from None
    found = config.get("chat_template")
    if found is None and (folder / "chat_template.json").is_file():
        found = read_object(folder / "chat_template.json", MOST).get("chat_template")
    if isinstance(found, list):
        found = next((t.get("template") for t in found if isinstance(t, Mapping) and t.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            raw = file.read(MOST + 1)
    except OSError as error:
        raise unreadable(path, error) from None
    if len(raw) > MOST:
        raise damaged(path, f"it is larger than {MOST >> 20} MiB", HINT)
    return raw
