"""The contract on PyTorch: an NVIDIA GPU, or torch's CPU device where the same code is tested.

Torch's own operations wherever they exist; kernels of ours only for products over packed weights (`kernels.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ...errors import BadOption, Unavailable, Unsupported
from ...registry import did_you_mean
from ...tensors import Tensor
from ..base import (
    FEATURES,
    AttentionSpec,
    Backend,
    Footprint,
    Info,
    LayerCache,
    Sampled,
    SamplingParams,
    Step,
    cache_dtype,
    keeps_float32,
)
from . import sampling
from .attention import DevicePlaces, TorchCache, TorchPlaces, attend
from .experts import TorchExperts
from .graphs import Replay
from .recurrence import TorchRecurrence
from .training import TorchTraining
from .weights import TORCH, DenseWeight, Weight, footprint, prepare

KEPT = TORCH | {"int8": torch.int8}  # of a cache

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "clamp": lambda x: x.clamp(-7, 7),
    "clamped_swish": lambda x: x.clamp(max=7) * torch.sigmoid(1.702 * x.clamp(max=7)),
}


class CudaBackend(TorchRecurrence, TorchExperts, TorchTraining, Backend):
    """dtype: of activations and cache. packed: quantized weights stay so."""

    name = "cuda"

    def __init__(self, device: torch.device, dtype: str, exact: bool, packed: bool):
        self.device, self.dtype, self.exact, self.packed = device, TORCH[dtype], exact, packed
        self.asynchronous = device.type != "cpu"
        self.features = frozenset(FEATURES) - ({"burst"} if device.type == "cuda" else {"compile", "burst"})
        self._freqs: dict[int, tuple[np.ndarray, torch.Tensor]] = {}
        self._places: TorchPlaces | DevicePlaces | None = None  # of the step that passes through the layers just now

    def info(self) -> Info:
        on_gpu = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
        dtype = next(name for name, value in TORCH.items() if value == self.dtype)
        return Info(self.name, f"{name} (torch {torch.__version__})", dtype, self.exact, self.features)

    # ---- life and transfer

    def prepare(self, tensor: Tensor) -> Weight:
        return prepare(tensor, self.dtype, self.device, self.packed)

    def footprint(self, tensor: Tensor) -> Footprint:
        return Footprint(footprint(tensor, self.dtype, self.packed))

    def device_memory(self) -> int | None:
        return torch.cuda.mem_get_info(self.device)[1] if self.device.type == "cuda" else None

    def weight(self, w: Any) -> Weight:
        """What `prepare` returned, or an array in its place."""
        return DenseWeight(w.to(self.dtype)) if isinstance(w, torch.Tensor) else w

    def vector(self, w: Any) -> torch.Tensor | None:
        return None if w is None else self.weight(w).numbers(self.dtype)

    def release(self, weight: Weight) -> None:
        weight.clear()

    def array(self, values: np.ndarray, dtype: str | None = None) -> torch.Tensor:
        kept, values = keeps_float32(dtype), np.asarray(values)
        floating = values.dtype.kind == "f"
        copy = torch.from_numpy(np.array(values, np.float32 if floating else np.int32))
        return copy.to(self.device, self.dtype) if floating and not kept else copy.to(self.device)

    def numpy(self, a: torch.Tensor) -> np.ndarray:
        return a.detach().to("cpu", torch.float32 if a.is_floating_point() else torch.int32).numpy()

    def zeros(self, shape: Sequence[int]) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=self.dtype, device=self.device)

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def dequantize(self, weight: Any) -> torch.Tensor:
        return weight.float() if isinstance(weight, torch.Tensor) else weight.numbers(torch.float32)

    # ---- forward

    def embed(self, weight: Any, ids: torch.Tensor) -> torch.Tensor:
        return self.weight(weight).rows(ids, self.dtype)

    def linear(self, x: torch.Tensor, weight: Any, bias: Any = None) -> torch.Tensor:
        return self.weight(weight).apply(x, self.vector(bias))

    def rms_norm(self, x: torch.Tensor, gain: Any, eps: float, offset: float = 0.0) -> torch.Tensor:
        gain = None if gain is None else self.weight(gain).shifted(offset)
        if gain is None or gain.shape == x.shape[-1:]:
            return F.rms_norm(x, x.shape[-1:], gain, eps)
        return F.rms_norm(x, x.shape[-1:], None, eps) * gain.unflatten(0, (-1, x.shape[-1])).to(x.dtype)

    def layer_norm(self, x: torch.Tensor, gain: Any, bias: Any, eps: float) -> torch.Tensor:
        gain, bias = self.vector(gain), self.vector(bias)
        if gain is None or gain.shape == x.shape[-1:]:
            return F.layer_norm(x, x.shape[-1:], gain, bias, eps)
        y = F.layer_norm(x, x.shape[-1:], None, None, eps) * gain.unflatten(0, (-1, x.shape[-1]))
        return y if bias is None else y + bias

    def rope(
        self, x: torch.Tensor, step: Step, freqs: np.ndarray, interleaved: bool = False, scale: float = 1.0
    ) -> torch.Tensor:
        cos, sin = self._where(step, x.shape[1]).turns(self._on_device(freqs), scale)
        dims = 2 * cos.shape[-1]
        turning = x[..., :dims].float()
        first, second = turning.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turning.chunk(2, dim=-1)
        pair = first * cos - second * sin, second * cos + first * sin
        turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
        return torch.cat([turned.to(x.dtype), x[..., dims:]], dim=-1) if dims < x.shape[-1] else turned.to(x.dtype)

    def positions(self, step: Step, tokens: int) -> torch.Tensor:
        return self._places.starts[:, None] if self.recording else super().positions(step, tokens)

    def sharpness(self, step: Step, tokens: int, every: int, weight: float, ahead: int = 0) -> torch.Tensor:
        if not self.recording:
            return super().sharpness(step, tokens, every, weight, ahead)
        past = (self._places.starts[:, None, None] + ahead).float().div(every).floor()
        return (1 + weight * past.log1p()).to(self.dtype)

    def act(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        if kind not in ACTIVATIONS:
            raise Unsupported(f"There is no activation named {kind!r}.", did_you_mean(kind, ACTIVATIONS))
        return ACTIVATIONS[kind](x)

    def softcap(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        return (x / cap).tanh() * cap

    def take(self, x: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        return x[torch.from_numpy(np.array(rows, np.int64)).to(x.device)]

    def split(self, x: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
        return x.split(list(sizes), dim=-1)

    # ---- attention

    def new_cache(self, specs: Sequence[LayerCache], slots: int, capacity: int, dtype: str | None = None) -> TorchCache:
        kept = self.dtype if dtype is None else KEPT[cache_dtype(dtype, self.features)]
        return TorchCache(specs, slots, capacity, kept, self.device)

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: Any, spec: AttentionSpec, step: Step, layer: int
    ) -> torch.Tensor:
        places, first = self._where(step, q.shape[1]), 0
        if step.cache is not None:
            first = places.first_seen(spec)
            k, v = step.cache.exchange(layer, places, first, k, v)
        return attend(q, k, v, self.vector(sinks), spec, places.mask(spec, first, k.shape[1]))

    def latent_attention(
        self, q_nope: torch.Tensor, q_rope: torch.Tensor, c: torch.Tensor, k_rope: torch.Tensor, wk: Any, wv: Any,
        spec: AttentionSpec, step: Step, layer: int,
    ) -> torch.Tensor:  # fmt: skip
        """Absorbed: a query meets the latent itself, and what it takes of the latents is expanded once."""
        wk, wv = self.vector(wk), self.vector(wv)
        q = torch.cat([torch.einsum("bthn,hnl->bthl", q_nope, wk), q_rope], dim=-1)
        k = torch.cat([c, k_rope], dim=-1)[:, :, None]
        places, first = self._where(step, q.shape[1]), 0
        if step.cache is not None:
            first = places.first_seen(spec)
            (k,) = step.cache.exchange(layer, places, first, k)
        mixed = attend(q, k, k[..., : c.shape[-1]], None, spec, places.mask(spec, first, k.shape[1]))
        return torch.einsum("bthl,hvl->bthv", mixed, wv)

    def _where(self, step: Step, tokens: int) -> TorchPlaces | DevicePlaces:
        """Worked out for the first layer, kept for the others."""
        if self._places is None or self._places.step is not step or self._places.tokens != tokens:
            self._places = TorchPlaces(step, tokens, self.device)
        return self._places

    def _on_device(self, freqs: np.ndarray) -> torch.Tensor:
        """Kept by identity, for models keep theirs (and a recording can't fetch from the host); the array is kept
        beside it, so that its id stays its own."""
        if id(freqs) not in self._freqs:
            self._freqs[id(freqs)] = freqs, torch.from_numpy(np.array(freqs, np.float32)).to(self.device)
        return self._freqs[id(freqs)][1]

    @property
    def recording(self) -> bool:
        """Is this a step whose numbers only the device knows?"""
        return isinstance(self._places, DevicePlaces)

    @contextmanager
    def at(self, places: DevicePlaces) -> Iterator[None]:
        """Inside, the step of `places` has its numbers on the device."""
        self._places = places
        try:
            yield
        finally:
            self._places = None

    # ---- sampling

    def sample(
        self, logits: torch.Tensor, params: Sequence[SamplingParams], u: np.ndarray,
        counts: tuple[np.ndarray, np.ndarray] | None = None, mask: np.ndarray | None = None,
    ) -> Sampled:  # fmt: skip
        return sampling.sample(logits, params, u, counts, mask)

    # ---- speed

    def compile(self, fn: Callable, state: Sequence[Any] = ()) -> Callable:
        return Replay(self, fn, capture=True) if "compile" in self.features else fn


def open_backend(exact: bool, threads: int | None, dtype: str | None, device: str | None) -> CudaBackend:
    """See `create`. Raises BadOption for an unknown dtype or device, Unavailable for a GPU that torch does not see."""
    if dtype is not None and dtype not in TORCH:
        raise BadOption(f"The cuda backend does not compute in {dtype!r}.", did_you_mean(dtype, TORCH))
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise BadOption(f"Torch has no device {device!r}.", "Choose cuda, cuda:1, … or cpu.") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise Unavailable(
            "Torch sees no CUDA device here.", "Install a torch with CUDA and a driver, or use device cpu."
        )
    if threads is not None:
        torch.set_num_threads(threads)
    if exact:
        torch.set_float32_matmul_precision("highest")  # no TF32
    on_gpu = where.type == "cuda"
    if on_gpu:  # sums in float32, also where a product is cut in pieces
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    usual = "bfloat16" if on_gpu else "float32"
    return CudaBackend(where, "float32" if exact else dtype or usual, exact, packed=on_gpu)
