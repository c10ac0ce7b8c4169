"""What a run leaves for others: an adapter in PEFT's format, or a model folder."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ..adapters import Adapter, Modules, read_adapter, write_adapter
from ..adapters import LowRank as Update
from ..checkpoint import write_folder
from ..errors import BadOption
from ..models.families.writing import Piece
from ..models.families.writing import specs as laid_out
from ..runtime.session import Session
from ..runtime.side_files import side_files
from ..schemes import to_float
from ..tensors import Dense, Tensor, dense, store
from .methods import Full, LowRank, Method, Prompt, Scales, make_method
from .settings import Settings

Params = Mapping[str, np.ndarray]


def write_artifact(dest: Path, session: Session, method: Method, params: Params, settings: Settings) -> None:
    """The trained parameters: each file appears whole or not at all. Raises OnDeviceError."""
    if isinstance(method, Full):
        write_model(dest, session, [_piece(session, name, values) for name, values in params.items()])
    elif isinstance(method, Scales):
        write_model(dest, session, [*with_scales(session, method, params)])
    else:
        write_adapter(dest, as_adapter(session, method, params, settings), Modules(session.family, session.config))


def as_adapter(session: Session, method: LowRank | Prompt, params: Params, settings: Settings) -> Adapter:
    if isinstance(method, Prompt):
        return Adapter({}, base=str(session.path), prompt=dense(params[Prompt.NAME]))
    updates = {}
    for name, target in method.targets.items():
        down, up, magnitude = (params.get(f"{name}.{part}") for part in ("lora_down", "lora_up", "magnitude"))
        updates[name] = Update(
            dense(down), dense(up), method.scale(target), None if magnitude is None else dense(magnitude)
        )
    whole = {name: dense(params[name]) for name in method.whole}
    if "embed" in whole and session.config.tied:
        whole["head"] = whole["embed"]
    return Adapter(updates, whole, settings.method == "rslora", settings.dropout, str(session.path))


def factors_of(path: str | Path, session: Session, settings: Settings) -> dict[str, np.ndarray]:
    """An adapter's numbers as the parameters of its method, to begin with. Raises what `read_adapter` raises, and
    BadOption where the settings would scale them otherwise."""
    method, adapter = make_method(session, settings), read_adapter(path, Modules(session.family, session.config))
    whole = getattr(method, "whole", ())
    made = {name: to_float(adapter.replaced[name]) for name in whole if name in adapter.replaced}
    if adapter.prompt is not None:
        made[Prompt.NAME] = to_float(adapter.prompt)
    for name, update in adapter.updates.items():
        target = method.targets.get(name) if isinstance(method, LowRank) else None
        if target and target.rank == update.rank and abs(method.scale(target) - update.scale) > 1e-6 * update.scale:
            raise BadOption(
                f"The adapter {path} has the scale {update.scale:g}, and these settings give {method.scale(target):g}.",
                f"Give --alpha {update.scale * target.rank:g}.",
            )
        for part, tensor in (("lora_down", update.down), ("lora_up", update.up), ("magnitude", update.magnitude)):
            if tensor is not None:
                made[f"{name}.{part}"] = to_float(tensor)
    return made


def with_scales(session: Session, method: Scales, params: Params) -> Iterator[Piece]:
    """The model with its scales as trained, all else as it was."""
    for name, shape in session.parameters.shapes.items():
        form = session.parameters[name].format
        load = partial(method.trained, name, params) if name in method.tensors else partial(_own, session, name)
        yield Piece(name, shape, form, load)


def _own(session: Session, name: str) -> Tensor:
    return session.parameters[name]


def write_model(dest: Path, session: Session, pieces: Sequence[Piece]) -> None:
    """The whole model as a Hugging Face folder inside `dest`, which may hold other files of the run; config.json, by
    which it is known as a model, comes last."""
    specs = list(laid_out(session.family.names, session.config, pieces))
    config = {k: v for k, v in session.hf_config.items() if k not in ("torch_dtype", "quantization_config")}
    config = {k: v for k, v in config.items() if k != "quantization"} | {"dtype": _dtype(session, "embed")}
    made = dest / f".model.{secrets.token_hex(4)}.partial"
    write_folder(made, config, specs, side_files(session.checkpoint))
    try:
        for path in sorted(made.iterdir(), key=lambda p: p.name == "config.json"):
            path.replace(dest / path.name)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _dtype(session: Session, name: str) -> str:
    """As the checkpoint stores it; bfloat16 for what was quantized."""
    stored = session.checkpoint.outline(session.parameters.stored(name)[0]).format
    return stored.dtype if isinstance(stored, Dense) else "bfloat16"


def _piece(session: Session, name: str, values: np.ndarray) -> Piece:
    dtype = _dtype(session, name)
    return Piece(name, values.shape, Dense(dtype), partial(_stored, values, dtype))


def _stored(values: np.ndarray, dtype: str) -> Tensor:
    return Tensor(values.shape, Dense(dtype), {"weight": store(values, dtype)})
