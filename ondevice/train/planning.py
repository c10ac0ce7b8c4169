"""Which batch goes through the model at once, and whether activations are computed twice, so that memory suffices."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..models.config import AttentionConfig, LayerConfig, MoEConfig
from ..runtime.memory import memory_bytes, peak_memory_bytes
from ..runtime.session import Session
from .data import Data
from .learner import LOGITS_BYTES
from .settings import Settings

SHARE = 0.8  # of the memory there is, to be used: other programs live here too


@dataclass(frozen=True)
class Plan:
    """micro_batch: rows that go through the model at once; memory: bytes that the process is expected to need."""

    micro_batch: int
    remat: bool
    memory: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(session: Session, data: Data, settings: Settings, parameters: int, memory: int | None = None) -> Plan:
    """The fastest way that fits in `memory` bytes (None: most of this machine's): whole batches and kept activations
    before rematerialisation, that before smaller batches, as gradients are summed all the same."""
    most = memory if memory is not None else int(SHARE * (memory_bytes() or 1 << 62))
    tokens = max(e.length for e in [*data.train, *data.valid])
    tokens = settings.max_length if settings.pack else tokens
    sequences = 2 if settings.objective in ("dpo", "orpo") else 1
    fixed = peak_memory_bytes() + 16 * parameters + 3 * LOGITS_BYTES
    sizes = [settings.micro_batch] if settings.micro_batch else _halves(settings.batch_size)
    ways = [False, True] if settings.remat is None else [settings.remat]
    for rows in sizes:
        for remat in ways:
            need = fixed + rows * sequences * tokens * activation_bytes(session, remat)
            if need <= most:
                return Plan(rows, remat, need)
    return Plan(sizes[-1], ways[-1], need)


def _halves(count: int) -> list[int]:
    sizes = [count]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def activation_bytes(session: Session, remat: bool) -> int:
    """What one token keeps in memory until the backward pass has come by, with LoRA on every linear map."""
    config, size = session.config, 4 if session.backend.info().dtype == "float32" else 2
    layers = [_kept(layer, config.width) for layer in config.layers]
    numbers = len(layers) * config.width + 2 * max(layers) if remat else sum(layers) + max(layers)
    return size * numbers


def _kept(layer: LayerConfig, width: int) -> int:
    """Numbers that one token leaves behind in one layer: what every operation read and wrote."""
    a, f = layer.mixer, layer.feed_forward
    hidden = f.hidden * f.per_token if isinstance(f, MoEConfig) else f.hidden
    return 10 * width + 3 * _projected(a) + 7 * hidden


def _projected(a: AttentionConfig) -> int:
    """q, k and v, and what attention makes of them."""
    return (2 * a.heads + 2 * a.kv_heads) * a.head_dim
