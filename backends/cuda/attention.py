"""Attention on torch: the cache, and a step's places as tensors, from the host's numbers or from the device's own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..base import AttentionSpec, Cache, LayerCache, StateCache, Step
from ..places import CAUSAL, Places


class _Turns:
    """Sines and cosines of a step's positions, once for all layers alike. positions: [B, T] float32"""

    positions: torch.Tensor

    @cached_property
    def _tables(self) -> dict[tuple, Any]:
        return {}

    def turns(self, freqs: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """freqs [r / 2] -> cosines and sines [B, T, 1, r / 2] float32, times scale."""
        if (freqs, scale) not in self._tables:
            angles = self.positions[:, :, None, None] * freqs
            self._tables[freqs, scale] = angles.cos() * scale, angles.sin() * scale
        return self._tables[freqs, scale]


class TorchPlaces(Places, _Turns):
    """Places as tensors, each made when first asked for."""

    def __init__(self, step: Step, tokens: int, device: torch.device):
        super().__init__(step, tokens)
        self.device = device

    @cached_property
    def positions(self) -> torch.Tensor:
        steps = torch.arange(self.tokens, dtype=torch.float32, device=self.device)
        return self.starts.float()[:, None] + steps

    @cached_property
    def starts(self) -> torch.Tensor:
        return self._there(self.step.starts)

    @cached_property
    def lengths(self) -> torch.Tensor:
        return self._there(self.step.lengths)

    @cached_property
    def slot_ids(self) -> torch.Tensor:
        return self._there(self.step.slots)

    @cached_property
    def segments(self) -> torch.Tensor:
        return self._there(self.step.segments)

    @cached_property
    def _scattered(self) -> list[torch.Tensor]:
        return [self._there(part) for part in self.real_tokens()]

    @cached_property
    def _masks(self) -> dict[tuple, torch.Tensor | str | None]:
        return {}

    def _there(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(values, np.int64)).to(self.device)

    def mask(self, spec: AttentionSpec, first: int, keys: int) -> torch.Tensor | str | None:
        """`seen`, once for all layers alike. CAUSAL only of squares: torch aligns it to the first key."""
        key = spec.window, spec.chunk, first, keys
        if key not in self._masks:
            seen = self.seen(spec, first, keys)
            if isinstance(seen, np.ndarray):
                seen = torch.from_numpy(seen).to(self.device)
            elif seen is CAUSAL and keys != self.tokens:
                seen = lower_right(self.tokens, keys, self.device)
            self._masks[key] = seen
        return self._masks[key]

    def write(self, kept: torch.Tensor, new: torch.Tensor) -> None:
        """new [B, T, K, d] to where this step's tokens belong in kept [slots, capacity, K, d]."""
        if self.even:
            kept[self.slots, self.start : self.end] = new
        else:
            row, place, slot, position = self._scattered
            kept[slot, position] = new[row, place].to(kept.dtype)

    def read(self, kept: torch.Tensor, first: int) -> torch.Tensor:
        """Of the step's rows, from position `first` to the end, [B, S, K, d]; a view where it can be."""
        if self.even:
            return kept[self.slots, first : self.end]
        return kept[:, first : self.end][self.slot_ids]


class DevicePlaces(_Turns):
    """A step of one token a row whose starts and lengths are on the device, so that a recorded step serves all that
    follow. Which slots, and how many positions are looked at, is fixed."""

    def __init__(self, step: Step, room: int, starts: torch.Tensor, lengths: torch.Tensor):
        self.step, self.tokens, self.room = step, 1, room
        self.starts, self.lengths = starts, lengths
        host = Places(step, 1)
        side_by_side = bool((step.slots == host.slot + np.arange(host.rows)).all())
        self.slot_ids = torch.from_numpy(step.slots.astype(np.int64)).to(starts.device)
        self.slots = host.slots if side_by_side else self.slot_ids

    @property
    def positions(self) -> torch.Tensor:
        return self.starts.float()[:, None]

    def forget(self) -> None:
        """Before another run: what was computed from the old numbers goes."""
        self.__dict__.pop("_tables", None)
        self.__dict__.pop("_masks", None)

    @cached_property
    def _masks(self) -> dict[tuple, torch.Tensor]:
        return {}

    def check(self, capacity: int) -> None:
        """Done where the numbers are known: before the replay."""

    def first_seen(self, spec: AttentionSpec) -> int:
        return 0

    def mask(self, spec: AttentionSpec, first: int, keys: int) -> torch.Tensor:
        """bool [B, 1, 1, room]"""
        key = spec.window, spec.chunk
        if key not in self._masks:
            i, j = self.starts[:, None], torch.arange(keys, device=self.starts.device)
            seen = j <= i
            if spec.window is not None:
                seen = seen & (i - j < spec.window)
            if spec.chunk is not None:
                seen = seen & (i // spec.chunk == j // spec.chunk)
            self._masks[key] = seen[:, None, None]
        return self._masks[key]

    def write(self, kept: torch.Tensor, new: torch.Tensor) -> None:
        where = self.slot_ids, self.starts.long().clamp(max=kept.shape[1] - 1)
        real = (self.lengths > 0)[:, None, None]
        kept[where] = torch.where(real, new[:, 0].to(kept.dtype), kept[where])

    def read(self, kept: torch.Tensor, first: int) -> torch.Tensor:
        return kept[:, : self.room][self.slots]


class TorchCache(Cache):
    """Keys and values by layer, [slots, capacity, K, d], set aside at once: recorded steps need them to stay where they
    are; in int8 each with its scales behind it, [slots, capacity, K, 1]; and states [slots, …], which `gated_delta` and
    `short_convolution` write. No ring: `truncate` goes back to any length, or to 0 where there are states."""

    def __init__(
        self, specs: Sequence[LayerCache | StateCache], slots: int, capacity: int, dtype: torch.dtype,
        device: torch.device,
    ):  # fmt: skip
        self.capacity = capacity
        self.recurrent = any(isinstance(spec, StateCache) for spec in specs)
        self.lengths = np.zeros(slots, np.int32)

        def room(spec: LayerCache | StateCache) -> list[torch.Tensor]:
            widths = () if isinstance(spec, StateCache) else (spec.key_dim, spec.value_dim)
            kinds = {dtype: None} if dtype != torch.int8 else {torch.int8: None, torch.float32: 1}
            return [
                torch.zeros((slots, capacity, spec.kv_heads, one or w), dtype=kind, device=device)
                for w in widths if w for kind, one in kinds.items()
            ]  # fmt: skip

        def states(spec: LayerCache | StateCache) -> dict[str, torch.Tensor]:
            shapes = vars(spec) if isinstance(spec, StateCache) else {}
            return {part: torch.zeros((slots, *shape), device=device) for part, shape in shapes.items() if shape}

        self.layers = [room(spec) for spec in specs]
        self.states = [states(spec) for spec in specs]

    def exchange(
        self, layer: int, places: TorchPlaces | DevicePlaces, first: int, *new: torch.Tensor
    ) -> list[torch.Tensor]:
        """Writes the step's keys (and values, unless their width is 0), [B, T, K, d]; reads all that its queries may
        see, [B, S, K, d], in new's dtype. Raises ContextFull before anything is written."""
        places.check(self.capacity)
        layer, dtype = self.layers[layer], new[0].dtype
        if len(layer) > len(new):
            new = [part for values in new for part in to_int8(values)]
        for kept, values in zip(layer, new, strict=True):
            places.write(kept, values)
        found = [places.read(kept, first) for kept in layer]
        if layer[0].dtype == torch.int8:
            return [(codes * scales).to(dtype) for codes, scales in zip(found[::2], found[1::2], strict=True)]
        return [part.to(dtype) for part in found]

    def snapshot(self, slot: int) -> tuple:
        n = int(self.lengths[slot])
        states = [{name: part[slot].clone() for name, part in layer.items()} for layer in self.states]
        return n, [[part[slot, :n].clone() for part in parts] for parts in self.layers], states

    def restore(self, slot: int, state: tuple) -> None:
        n, copies, states = state
        for parts, kept in zip(copies, self.layers, strict=True):
            for part, into in zip(parts, kept, strict=True):
                into[slot, :n] = part
        for parts, kept in zip(states, self.states, strict=True):
            for name, part in parts.items():
                kept[name][slot] = part
        self.lengths[slot] = n

    @property
    def nbytes(self) -> int:
        kept = [part for parts in self.layers for part in parts]
        return sum(part.nbytes for part in (*kept, *(part for layer in self.states for part in layer.values())))


def to_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., d] as an int8 cache keeps it: codes, and scales [..., 1] float32."""
    x = x.float()
    scales = x.abs().amax(-1, keepdim=True) / 127
    return (x / torch.where(scales > 0, scales, 1.0)).round().to(torch.int8), scales


def lower_right(tokens: int, keys: int, device: torch.device) -> torch.Tensor:
    """CAUSAL written out, bool [1, 1, tokens, keys]: the last query is the last key's."""
    return torch.ones(1, 1, tokens, keys, dtype=torch.bool, device=device).tril(keys - tokens)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, spec: AttentionSpec,
    mask: torch.Tensor | str | None,
) -> torch.Tensor:  # fmt: skip
    """q [B, T, H, d], k [B, S, K, d], v [B, S, K, dv] -> [B, T, H, dv]"""
    (b, tokens, heads, d), kv_heads = q.shape, k.shape[2]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if spec.softcap is not None or sinks is not None:
        return _composed(q.transpose(1, 2), k, v, sinks, spec, mask).transpose(1, 2)
    if tokens == 1 and heads != kv_heads:  # the heads that share a key head are queries side by side: nothing is copied
        grouped = q.reshape(b, kv_heads, heads // kv_heads, d)
        y = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=spec.scale)
        return y.reshape(b, 1, heads, -1)
    how = {"is_causal": True} if mask is CAUSAL else {"attn_mask": mask}
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, scale=spec.scale, enable_gqa=heads != kv_heads, **how)
    return y.transpose(1, 2)


def _composed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, spec: AttentionSpec,
    mask: torch.Tensor | str | None,
) -> torch.Tensor:  # fmt: skip
    """What torch's own can't do: scores through a softcap, sinks. q [B, H, T, d] -> [B, H, T, dv]"""
    (b, heads, tokens, d), kv_heads, keys = q.shape, k.shape[1], k.shape[2]
    grouped = (q * spec.scale).reshape(b, kv_heads, heads // kv_heads, tokens, d)
    scores = (grouped @ k[:, :, None].transpose(-1, -2)).float()
    if spec.softcap is not None:
        scores = (scores / spec.softcap).tanh() * spec.softcap
    if mask is CAUSAL:
        mask = lower_right(tokens, keys, q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
    if sinks is not None:
        last = sinks.float().reshape(1, kv_heads, -1, 1, 1)
        scores = torch.cat([scores, last.expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., :keys].to(v.dtype)
    return (weights @ v[:, :, None]).reshape(b, heads, tokens, -1)
