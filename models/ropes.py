"""Rotary positions: which angles a head's pairs turn by, from a config's words, under every scaling known here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from .fields import contradiction, flag, number, numbers, one_of, table, whole

Frequencies = tuple[np.ndarray, float]  # inverse frequencies [dim / 2] float32, and the factor on sine and cosine


@dataclass(frozen=True)
class RopeConfig:
    """`dim` of a head's dimensions turn, at `base`; `scaling` as in HF's rope_parameters. context: the positions that
    the config speaks of, by which some scalings reckon."""

    dim: int
    base: float = 10000.0
    scaling: Mapping = field(default_factory=dict)
    interleaved: bool = False
    context: int = 0

    def frequencies(self, length: int | None = None) -> Frequencies:
        """length: how many tokens there will be at most, by which dynamic and longrope choose; None: no more than the
        model was first trained on. It is chosen once: keys in a cache were turned by what was chosen then."""
        exponents = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        freqs = (1.0 / np.float32(self.base) ** exponents).astype(np.float32)
        key = "rope_type" if "rope_type" in self.scaling else "type"
        scaled, factor = one_of(self.scaling, key, SCALINGS, "default")(self, freqs, length or 0)
        return scaled.astype(np.float32), factor


def _unscaled(rope: RopeConfig, freqs: np.ndarray, length: int) -> Frequencies:
    return freqs, 1.0


def _linear(rope: RopeConfig, freqs: np.ndarray, length: int) -> Frequencies:
    """All positions closer together (Chen et al. 2023)."""
    return freqs / np.float32(number(rope.scaling, "factor")), 1.0


def _dynamic(rope: RopeConfig, freqs: np.ndarray, length: int) -> Frequencies:
    """A larger base, once there are more positions than were trained on (NTK-aware scaling)."""
    factor, dim = number(rope.scaling, "factor"), rope.dim
    stretch = factor * max(length, rope.context) / max(rope.context, 1) - (factor - 1)
    if dim <= 2 or stretch <= 0:
        raise contradiction(f"The config has a dynamic rope of {dim} dimensions and factor = {factor}.")
    base = np.float32(rope.base * stretch ** (dim / (dim - 2)))
    return 1.0 / base ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)), 1.0


def _llama3(rope: RopeConfig, freqs: np.ndarray, length: int) -> Frequencies:
    """Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    rule = rope.scaling
    low, high = number(rule, "low_freq_factor"), number(rule, "high_freq_factor")
    old = whole(rule, "original_max_position_embeddings")
    if low >= high:
        raise contradiction(f"The config has low_freq_factor = {low}, not below high_freq_factor = {high}.")
    wavelength = 2 * math.pi / freqs
    blend = np.clip((old / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * freqs / number(rule, "factor") + blend * freqs, 1.0


def _stretched_by(rope: RopeConfig) -> tuple[int, float]:
    """The positions of the first training, and by how much there are more now."""
    old = whole(rope.scaling, "original_max_position_embeddings", rope.context or None)
    return old, number(rope.scaling, "factor", max(rope.context, 1) / old)


def mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's temperature: by how much longer texts sharpen attention."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(rope: RopeConfig, freqs: np.ndarray, length: int) -> Frequencies:
    """Pairs that turn often within the first training's context are kept, those that turn less than once are
    stretched, with a ramp between (Peng et al. 2023)."""
    rule, (old, factor), half = rope.scaling, _stretched_by(rope), rope.dim // 2
    if rope.base <= 1:
        raise contradiction(f"The config has rope_theta = {rope.base}, of which yarn has no logarithm.")
    ends = [
        rope.dim * math.log(old / (number(rule, key, usual) * 2 * math.pi)) / (2 * math.log(rope.base))
        for key, usual in (("beta_fast", 32.0), ("beta_slow", 1.0))
    ]
    low, high = (math.floor(ends[0]), math.ceil(ends[1])) if flag(rule, "truncate", True) else ends
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = (np.arange(half, dtype=np.float32) - low) / (high - low if high != low else 0.001)
    stretched = np.clip(ramp, 0.0, 1.0)
    weights = [number(rule, key, 0.0, least=0.0) for key in ("mscale", "mscale_all_dim")]
    usual = mscale(factor, weights[0]) / mscale(factor, weights[1]) if all(weights) else mscale(factor)
    return freqs / factor * stretched + freqs * (1 - stretched), number(rule, "attention_factor", usual)


def _longrope(rope: RopeConfig, freqs: np.ndarray, length: int) -> Frequencies:
    """A searched factor for each pair, one list for texts within the first training's context and one for longer ones
    (Ding et al. 2024)."""
    old, factor = _stretched_by(rope)
    which = "long" if length > old else "short"
    factors = numbers(rope.scaling, f"{which}_factor")
    if len(factors) != rope.dim // 2:
        raise contradiction(f"The config has {len(factors)} factors of longrope for {rope.dim // 2} pairs.")
    usual = math.sqrt(1 + math.log(factor) / math.log(old)) if factor > 1 < old else 1.0
    usual = number(rope.scaling, "attention_factor", usual)
    return freqs / np.array(factors, np.float32), number(rope.scaling, f"{which}_mscale", usual)


SCALINGS: dict[str, Callable[[RopeConfig, np.ndarray, int], Frequencies]] = {
    "default": _unscaled, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn,
    "longrope": _longrope, "mrope": _unscaled,  # axes of pictures; in text they all count alike
}  # fmt: skip


def rope(
    hf: Mapping, head_dim: int, base: float = 10000.0, share: float = 1.0, interleaved: bool = False
) -> RopeConfig:
    """Positions from config.json, old keys (rope_theta, rope_scaling) and new (rope_parameters). base and share (how
    much of a head turns) are what the family's config class has where the file says nothing."""
    rule = table(hf, "rope_parameters") or table(hf, "rope_scaling")
    base = number(rule, "rope_theta", number(hf, "rope_theta", base))
    share = number(rule, "partial_rotary_factor", number(hf, "partial_rotary_factor", share))
    dim = int(head_dim * share)
    if share > 1 or dim < 2 or dim % 2:
        raise contradiction(f"The config has heads of {head_dim}, of which {head_dim * share:g} cannot turn in pairs.")
    if "original_max_position_embeddings" in hf:
        rule = {"original_max_position_embeddings": hf["original_max_position_embeddings"], **rule}
    found = RopeConfig(dim, base, rule, interleaved, whole(hf, "max_position_embeddings", 1))
    for length in (None, found.context):  # asked now: what cannot be is said before the weights are read
        found.frequencies(length)
    return found


def ropes_by_window(hf: Mapping, head_dim: int, base: float, local_base: float) -> dict[str, RopeConfig]:
    """Positions of layers with a window ("local") and of those without ("main"): nested by kind of layer, as
    transformers 5 writes them, or under keys of their own as before. Scalings were always meant for "main"."""
    both = table(hf, "rope_parameters")
    main = table(both, "full_attention") or {"rope_theta": hf.get("rope_theta"), **table(hf, "rope_scaling")}
    local = table(both, "sliding_attention") or {"rope_theta": hf.get("rope_local_base_freq")}
    plain = {key: hf.get(key) for key in ("max_position_embeddings", "original_max_position_embeddings") if key in hf}
    found = {"main": (main, base), "local": (local, local_base)}
    return {name: rope({**plain, "rope_parameters": rule}, head_dim, base) for name, (rule, base) in found.items()}
