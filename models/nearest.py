"""For a model of no known family: the known ones whose tensors are most like its own, and what differs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher

from ..checkpoint import Checkpoint
from ..registry import families
from .families import Family
from .parameters import fit

MOST = 2  # families named


def nearest(checkpoint: Checkpoint, kind: str) -> str:
    """Two of them, the likest first (and, of several alike, those whose names are like `kind`), or "" where none is
    like it: `mistral (not used: …)`."""
    found = [difference for f in families().values() if (difference := _difference(f, checkpoint))]
    found.sort(key=lambda d: (d[0], -SequenceMatcher(None, kind[:80], d[1]).ratio()))
    return "; ".join(f"{name} ({what})" for _, name, what in found[:MOST])


def _difference(family: Family, checkpoint: Checkpoint) -> tuple[int, str, str] | None:
    """How many kinds of tensors differ, the family's name, and which; None where it has little in common."""
    try:
        gguf = checkpoint.kind == "gguf"
        hf: Mapping = family.gguf.config(checkpoint.metadata, checkpoint) if gguf else checkpoint.config
        config = family.config({**hf, "model_type": family.model_types[0]})
        where, _, unused, _ = fit(family.gguf.names if gguf else family.names, config, checkpoint)
    except Exception:  # a config of another family may go wrong in any way in this one's hands, a plug-in's too
        return None
    missing = _kinds(name for name, found in where.items() if not found)
    if 2 * len(missing) > len(_kinds(where)):
        return None
    lists = {"missing": missing, "not used": _kinds(unused)}
    told = "; ".join(f"{what}: {', '.join(kinds[:6])}" for what, kinds in lists.items() if kinds)
    return len(missing) + len(lists["not used"]), family.name, told or "its tensors have the same names"


def _kinds(names: Iterable[str]) -> list[str]:
    """Names, the same in every layer and expert told once."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name)[:80] for name in names))
