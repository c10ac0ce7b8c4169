"""Writes oracle.json.gz: what llama.cpp makes of `texts.texts()`, so that the tests need no llama.cpp.

    pip install llama-cpp-python gguf
    python make_oracle.py SmolLM2-135M-Instruct.Q4_1.gguf

"smollm2": every text with its ids; "smollm2_plain": with special tokens as plain text. "pre": for each pre-tokenizer,
the ids of `some_texts()` under SmolLM2's own vocabulary and merges. "spm": small sentencepiece tokenizers as GGUF, with
the ids of every third text.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import llama_cpp

from ondevice.checkpoint import open_checkpoint
from ondevice.runtime.tokenizer.pretokenizers import RULES
from tests.runtime.small_tokenizers import as_gguf, sentencepiece_model
from tests.runtime.texts import some_texts, texts

OUT = Path(__file__).with_name("oracle.json.gz")


def write_vocabulary(path: Path, metadata: Mapping[str, Any]) -> None:
    """A GGUF of nothing but a vocabulary."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def tokenize(path: Path, wanted: list[str], parse_special: bool = True) -> list[list[int]]:
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=True, special=parse_special) for text in wanted]


def tokenize_with(metadata: Mapping[str, Any], wanted: list[str], parse_special: bool = True) -> list[list[int]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        write_vocabulary(path, metadata)
        return tokenize(path, wanted, parse_special)


def spm(wanted: list[str]) -> list[dict[str, Any]]:
    found = []
    for dummy_prefix in (True, False):
        metadata = as_gguf(sentencepiece_model(dummy_prefix, ("<tool>", "  ", "    ", "\t\t")))
        ids, plain = (tokenize_with(metadata, wanted, parse) for parse in (True, False))
        found.append({"metadata": metadata, "ids": ids, "plain": plain})
    return found


def main(path: Path) -> None:
    metadata, wanted = open_checkpoint(path).metadata, texts()
    kept = {key: metadata[key] for key in metadata if key.startswith("tokenizer.ggml.")}
    names = [names.split()[0] for names in RULES.values()]
    found = {
        "texts": wanted,
        "some_texts": some_texts(),
        "smollm2": tokenize(path, wanted),
        "smollm2_plain": tokenize(path, wanted, parse_special=False),
        "pre": {name: tokenize_with(kept | {"tokenizer.ggml.pre": name}, some_texts()) for name in names},
        "spm": spm(wanted[::3]),
    }
    packed = json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode()
    OUT.write_bytes(gzip.compress(packed, 9, mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
