"""Text <-> token ids, for the tokenizers of Hugging Face folders and of GGUF files alike.

`load_tokenizer` finds the tokenizer of a model; a `Tokenizer` encodes, decodes, streams, and writes itself as the files
of a Hugging Face folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .tokenizer import Stream, Tokenizer
from .vocabulary import Kind, Vocabulary

__all__ = ["Kind", "Stream", "Tokenizer", "Vocabulary", "gguf_tokenizer", "load_tokenizer"]


def load_tokenizer(source: str | Path | Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a Hugging Face folder (its path) or of a GGUF file (its metadata).

    Ids equal those of transformers for a folder, and of llama.cpp for GGUF. Raises BadFile when there is none or it is
    damaged, Unsupported for a kind that isn't known here.
    """
    if isinstance(source, Mapping):
        from .gguf import from_gguf

        return from_gguf(source)
    from .folder import from_folder

    return from_folder(Path(source))


def gguf_tokenizer(folder: str | Path, vocab: int) -> dict[str, Any]:
    """The tokenizer of a Hugging Face folder as the `tokenizer.…` keys of a GGUF, for a model of `vocab` token ids.

    Raises what `load_tokenizer` raises, Unsupported where llama.cpp would give other ids.
    """
    from .to_gguf import gguf_tokenizer as translate

    return translate(Path(folder), vocab)
