"""Writes oracle.json.gz: what llama.cpp makes of `texts.texts()`, so that the tests need no llama.cpp.

    pip install llama-cpp-python gguf
    python make_oracle.py SmolLM2-135M-Instruct.Q4_1.gguf

"smollm2": every text with its ids. "pre": for each pre-tokenizer, the ids of every ninth text under SmolLM2's own
vocabulary and merges, null where llama.cpp knows no such pre-tokenizer.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from pathlib import Path

import gguf
import llama_cpp
from texts import texts

from ondevice.checkpoint import open_checkpoint
from ondevice.runtime.tokenizer.pretokenizers import RULES

OUT = Path(__file__).with_name("oracle.json.gz")
EVERY = 9


def write_vocabulary(path: Path, metadata, pre: str) -> None:
    """A GGUF of nothing but SmolLM2's vocabulary, under another pre-tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(metadata["tokenizer.ggml.tokens"])
    writer.add_token_types(metadata["tokenizer.ggml.token_type"])
    writer.add_token_merges(metadata["tokenizer.ggml.merges"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def tokenize(path: Path, wanted: list[str], parse_special: bool = True) -> list[list[int]]:
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=True, special=parse_special) for text in wanted]


def tokenize_as(pre: str, metadata, wanted: list[str]) -> list[list[int]] | None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        write_vocabulary(path, metadata, pre)
        try:
            return tokenize(path, wanted)
        except ValueError:  # this version of llama.cpp doesn't know it
            return None


def main(path: Path) -> None:
    metadata, wanted = open_checkpoint(path).metadata, texts()
    found = {
        "texts": wanted,
        "smollm2": tokenize(path, wanted),
        "smollm2_plain": tokenize(path, wanted, parse_special=False),
        "pre": {names.split()[0]: tokenize_as(names.split()[0], metadata, wanted[::EVERY]) for names in RULES.values()},
    }
    packed = json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode()
    OUT.write_bytes(gzip.compress(packed, 9, mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
