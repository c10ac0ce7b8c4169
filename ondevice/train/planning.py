"""Which batch goes through the model at once, and whether activations are computed twice, so that memory suffices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import OnDeviceError
from ..machine import memory_bytes, used_bytes
from ..models.config import MoEConfig
from ..models.parameters import expected
from ..runtime.session import Session
from .data import Data
from .learner import logits_bytes
from .settings import Settings

SHARE = 0.8  # of the memory there is, to be used: other programs live here too
COPIES = 3  # of each parameter, in float32, at every moment: itself, the best, and its gradient
LOGITS = 3  # their values, their softmax and their gradient
OUTPUTS = 1.2  # numbers kept for each output of a linear map, with a LoRA: measured on SmolLM2-135M, batch 4 x 256
WIDTHS = 4  # and for each of the stream: what norms read, and its sums


@dataclass(frozen=True)
class Plan:
    """micro_batch: rows that go through the model at once; memory: bytes that the process is expected to need."""

    micro_batch: int
    remat: bool
    memory: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(session: Session, data: Data, settings: Settings, parameters: int, memory: int | None = None) -> Plan:
    """The fastest way that fits in `memory` bytes (None: most of what the weights' place has): whole batches and kept
    activations before rematerialisation, that before smaller batches, as gradients are summed all the same. Raises
    OnDeviceError where not even the leanest fits."""
    device = session.backend.device_memory()
    most = memory if memory is not None else int(SHARE * (device or memory_bytes() or 1 << 62))
    held = session.checkpoint.nbytes if device else used_bytes()
    moments = 2 * parameters * settings.moment_bits // 8
    fixed, update = held + 4 * COPIES * parameters + moments, 4 * parameters + moments  # an update makes them anew
    for found in _ways(session, data, settings, fixed, update):
        if found.memory <= most:
            return found
    raise OnDeviceError(
        f"Training needs about {found.memory / 1e6:.0f} MB, with {found.micro_batch} at once"
        f"{' and activations computed twice' if found.remat else ''}; there are {most / 1e6:.0f} MB to plan for.",
        "Give a smaller --max-length or --rank, adapt fewer --layers, or take a smaller model.",
    )


def _ways(session: Session, data: Data, settings: Settings, fixed: int, update: int) -> Iterator[Plan]:
    """From the fastest to the leanest. Of the two passes and of the update behind them, the larger counts."""
    tokens = settings.max_length if settings.pack else max(e.length for e in [*data.train, *data.valid])
    tokens += settings.virtual_tokens if settings.method == "prompt" else 0
    sequences = 2 if settings.objective in ("dpo", "orpo") else 1
    for rows in [settings.micro_batch] if settings.micro_batch else _halves(settings.batch_size):
        for remat in (False, True) if settings.remat is None else (settings.remat,):
            places = rows * sequences * tokens
            logits = min(logits_bytes(remat), 4 * places * session.config.vocab)
            passes = LOGITS * logits + places * activation_bytes(session, remat)
            yield Plan(rows, remat, fixed + max(passes, update))


def _halves(count: int) -> list[int]:
    sizes = [count]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def activation_bytes(session: Session, remat: bool) -> int:
    """What one token keeps in memory until the backward pass has come by, with LoRA on every linear map."""
    width, layers = session.config.width, _kept(session)
    numbers = len(layers) * width + 2 * max(layers) if remat else sum(layers) + max(layers)
    return (4 if session.backend.info().dtype == "float32" else 2) * numbers


def _kept(session: Session) -> list[int]:
    """Numbers that one token leaves behind in each layer."""
    layers = [WIDTHS * session.config.width] * len(session.config.layers)
    for name, shape in expected(session.config).items():
        if name.startswith("layers.") and len(shape) > 1:
            i = int(name.split(".")[1])
            f = session.config.layers[i].feed_forward
            used = f.per_token if len(shape) == 3 and isinstance(f, MoEConfig) else 1
            layers[i] += int(OUTPUTS * shape[-2] * used)
    return layers
