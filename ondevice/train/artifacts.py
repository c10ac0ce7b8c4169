"""What a run leaves for others: an adapter in PEFT's format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..adapters import Adapter, Modules, read_adapter, write_adapter
from ..adapters import LowRank as Update
from ..runtime.session import Session
from ..tensors import dense, floats
from .methods import LowRank, Method
from .settings import Settings


def write_artifact(
    dest: Path, session: Session, method: Method, params: Mapping[str, np.ndarray], settings: Settings
) -> None:
    """The trained parameters, whole or not at all. Raises OnDeviceError."""
    write_adapter(dest, as_adapter(session, method, params, settings), Modules(session.family, session.config))


def as_adapter(session: Session, method: LowRank, params: Mapping[str, np.ndarray], settings: Settings) -> Adapter:
    updates = {}
    for name, target in method.targets.items():
        down, up, magnitude = (params.get(f"{name}.{part}") for part in ("lora_down", "lora_up", "magnitude"))
        updates[name] = Update(
            dense(down), dense(up), method.scale(target), None if magnitude is None else dense(magnitude)
        )
    return Adapter(updates, rslora=settings.method == "rslora", dropout=settings.dropout, base=str(session.path))


def factors_of(path: str | Path, session: Session) -> dict[str, np.ndarray]:
    """An adapter's factors as the parameters of a LoRA, to begin with. Raises what `read_adapter` raises."""
    made = {}
    for name, update in read_adapter(path, Modules(session.family, session.config)).updates.items():
        for part, tensor in (("lora_down", update.down), ("lora_up", update.up), ("magnitude", update.magnitude)):
            if tensor is not None:
                made[f"{name}.{part}"] = floats(tensor.parts["weight"], tensor.format.dtype)
    return made
