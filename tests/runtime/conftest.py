from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ondevice.checkpoint import open_checkpoint
from ondevice.runtime.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def oracle() -> dict[str, Any]:
    """What llama.cpp makes of `texts.texts()`; make_oracle.py wrote it."""
    return json.loads(gzip.decompress(Path(__file__).with_name("oracle.json.gz").read_bytes()))


@pytest.fixture(scope="session")
def smollm2_metadata(smollm2_gguf: Path) -> Mapping[str, Any]:
    return open_checkpoint(smollm2_gguf).metadata


@pytest.fixture(scope="session")
def smollm2(smollm2_metadata: Mapping[str, Any]) -> Tokenizer:
    return load_tokenizer(smollm2_metadata)
