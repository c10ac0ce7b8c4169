"""The tokenizer of a Hugging Face folder: tokenizer.json, or else sentencepiece's tokenizer.model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import sentencepiece
import tokenizers

from ...errors import BadFile
from . import Facts, Tokenizer
from .engines import FastCutter, PieceCutter

FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt",
)  # fmt: skip
REFETCH = "Fetch the model again, with its tokenizer files."


def from_folder(folder: Path) -> Tokenizer:
    """Raises BadFile when the folder has no tokenizer, or a damaged one."""
    config = _read(folder / "tokenizer_config.json")
    named = _read(folder / "special_tokens_map.json") | config
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    if "tokenizer.json" in files:
        cutter = _fast(folder / "tokenizer.json")
        special = frozenset(id for id, token in cutter.added.items() if token.special)
    elif "tokenizer.model" in files:
        cutter, special = _pieces(folder, config, named)
    else:
        raise BadFile(f"{folder} has neither tokenizer.json nor tokenizer.model.", REFETCH)
    bos, eos = (_id(cutter, _spelling(named.get(f"{kind}_token"))) for kind in ("bos", "eos"))
    facts = Facts(
        bos, frozenset({eos} - {None}), special | ({bos, eos} - {None}), _template(folder, config),
        _spelling(named.get("bos_token")), _spelling(named.get("eos_token")),
    )  # fmt: skip
    return Tokenizer(cutter, facts, files)


def _fast(path: Path) -> FastCutter:
    try:
        fast = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise BadFile(f"{path} cannot be read: {error}.", REFETCH) from None
    fast.no_padding()
    fast.no_truncation()
    return FastCutter(fast)


def _pieces(folder: Path, config: Mapping, named: Mapping) -> tuple[PieceCutter, frozenset[int]]:
    path = folder / "tokenizer.model"
    model = path.read_bytes()
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError) as error:
        raise BadFile(f"{path} cannot be read: {error}.", REFETCH) from None
    added = _read(folder / "added_tokens.json") | {
        token["content"]: int(id) for id, token in (config.get("added_tokens_decoder") or {}).items()
    }
    control = {processor.id_to_piece(i): i for i in range(processor.vocab_size()) if processor.is_control(i)}
    special = frozenset(control.values()) | {
        int(id) for id, token in (config.get("added_tokens_decoder") or {}).items() if token.get("special")
    }
    ends = {kind: processor.piece_to_id(_spelling(named.get(f"{kind}_token")) or "") for kind in ("bos", "eos")}
    before = (ends["bos"],) if config.get("add_bos_token", True) else ()
    after = (ends["eos"],) if config.get("add_eos_token", False) else ()
    adds_space = processor.encode("a", out_type=str)[:1] != ["a"]
    return PieceCutter(model, control | added, special, before, after, adds_space), special


def _id(cutter: FastCutter | PieceCutter, spelling: str) -> int | None:
    return cutter.id_of(spelling) if spelling else None


def _spelling(token) -> str:
    """A special token in tokenizer_config.json is a string, or an object with its content."""
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else ""


def _template(folder: Path, config: Mapping) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {t.get("name"): t.get("template") for t in found if isinstance(t, Mapping)}.get("default")
    return found if isinstance(found, str) else None


def _read(path: Path) -> dict:
    """A JSON object, {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadFile(f"{path} cannot be read: {error}.", REFETCH) from None
    if not isinstance(found, dict):
        raise BadFile(f"{path} is not a JSON object.", REFETCH)
    return found
