"""What a model needs beside its weights: tokenizer, chat template, how to sample from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..checkpoint import Checkpoint
from .tokenizer import Tokenizer, load_tokenizer

SAMPLING = {  # GGUF's general.sampling.… -> Hugging Face's generation_config.json
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty",
}  # fmt: skip


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """A folder's, or the one inside a GGUF. Raises what `load_tokenizer` raises."""
    return load_tokenizer(checkpoint.metadata if checkpoint.kind == "gguf" else checkpoint.path)


def side_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Name -> content of every file beside config.json and the weights: a folder's own, or a GGUF's translated.

    Raises what `load_tokenizer` raises for a GGUF whose tokenizer is missing, damaged or not known.
    """
    if checkpoint.kind != "gguf":
        return {name: path.read_bytes() for name, path in checkpoint.files.items()}
    tokenizer = tokenizer_of(checkpoint)
    generation = json.dumps(generation_config(checkpoint.metadata, tokenizer), indent=2) + "\n"
    return {**tokenizer.files(), "generation_config.json": generation.encode()}


def generation_config(metadata: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """A GGUF's special tokens and recommended sampling as a generation_config.json."""
    main = metadata.get("tokenizer.ggml.eos_token_id")
    stops = sorted(tokenizer.eos_ids, key=lambda id: (id != main, id))
    config: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stops if len(stops) > 1 else next(iter(stops), None),
    }
    config["pad_token_id"] = metadata.get("tokenizer.ggml.padding_token_id")
    config |= {name: metadata.get(f"general.sampling.{key}") for key, name in SAMPLING.items()}
    given = {key: _short(value) for key, value in config.items() if isinstance(value, int | float | list)}
    return given | ({"do_sample": True} if given.get("temperature") else {})


def _short(value: Any) -> Any:
    """A float32 as its author wrote it: 0.6, not 0.6000000238418579."""
    return float(f"{value:.7g}") if isinstance(value, float) else value
