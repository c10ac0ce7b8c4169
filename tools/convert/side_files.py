"""What a model needs beside its weights: tokenizer, chat template, how to sample from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...checkpoint import Checkpoint

STOPS = ("eos", "eot", "eom")  # the tokens that end an answer, a turn, a message
SAMPLING = {  # GGUF's general.sampling.… -> Hugging Face's generation_config.json
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty",
}  # fmt: skip


def side_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Name -> content of every file beside config.json and the weights: a folder's own, or a GGUF's translated."""
    if checkpoint.kind != "gguf":
        return {name: path.read_bytes() for name, path in checkpoint.files.items()}
    generation = json.dumps(generation_config(checkpoint.metadata), indent=2) + "\n"
    return {"generation_config.json": generation.encode()}


def generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A GGUF's special tokens and recommended sampling as a generation_config.json."""
    ids = {kind: metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "padding", *STOPS)}
    stops = list(dict.fromkeys(ids[kind] for kind in STOPS if ids[kind] is not None))
    tokens = {"bos_token_id": ids["bos"], "eos_token_id": stops[0] if len(stops) == 1 else stops or None}
    found = {name: metadata.get(f"general.sampling.{key}") for key, name in SAMPLING.items()}
    config = tokens | {"pad_token_id": ids["padding"]} | found
    config = {key: value for key, value in config.items() if value is not None}
    return config | ({"do_sample": True} if found["temperature"] else {})
