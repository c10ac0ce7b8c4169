"""What a model is made of: frozen dataclasses in which every quirk of a family is a field with a neutral default, so
that Llama is "no flags". Nothing here knows a family's name or a backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..backends.base import AttentionSpec, LayerCache, RouteRule
from .fields import (
    activation,
    contradiction,
    flag,
    groups,
    head_dim,
    number,
    one_of,
    sliding_layers,
    table,
    whole,
)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions: `dim` of a head's dimensions turn, at `base`; `scaling` as in HF's rope_parameters."""

    dim: int
    base: float = 10000.0
    scaling: Mapping = field(default_factory=dict)
    interleaved: bool = False

    def frequencies(self) -> tuple[np.ndarray, float]:
        """Inverse frequencies [dim / 2] float32, and the factor on sine and cosine."""
        exponents = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        freqs = (1.0 / np.float32(self.base) ** exponents).astype(np.float32)
        key = "rope_type" if "rope_type" in self.scaling else "type"
        scaled = one_of(self.scaling, key, SCALINGS, "default")(freqs, self.scaling)
        return scaled.astype(np.float32), 1.0


def _unscaled(freqs: np.ndarray, rule: Mapping) -> np.ndarray:
    return freqs


def _linear(freqs: np.ndarray, rule: Mapping) -> np.ndarray:
    """All positions closer together (Chen et al. 2023)."""
    return freqs / np.float32(number(rule, "factor"))


def _llama3(freqs: np.ndarray, rule: Mapping) -> np.ndarray:
    """Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    low, high = number(rule, "low_freq_factor"), number(rule, "high_freq_factor")
    old = whole(rule, "original_max_position_embeddings")
    if low >= high:
        raise contradiction(f"The config has low_freq_factor = {low}, not below high_freq_factor = {high}.")
    wavelength = 2 * math.pi / freqs
    blend = np.clip((old / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * freqs / number(rule, "factor") + blend * freqs


SCALINGS: dict[str, Callable[[np.ndarray, Mapping], np.ndarray]] = {
    "default": _unscaled, "linear": _linear, "llama3": _llama3,
}  # fmt: skip


@dataclass(frozen=True)
class AttentionConfig:
    heads: int
    kv_heads: int
    head_dim: int
    spec: AttentionSpec
    rope: str | None = "main"  # which of ModelConfig.ropes; None: no positions
    qk_norm: bool = False  # RMS norm of each head of q and k, before rope
    bias: bool = False  # on q, k and v
    output_bias: bool = False

    @property
    def cache(self) -> LayerCache:
        return LayerCache(self.kv_heads, self.head_dim, self.head_dim, self.spec.window)


@dataclass(frozen=True)
class MLPConfig:
    """down(act(gate(x)) * up(x))"""

    hidden: int
    act: str = "silu"
    bias: bool = False


@dataclass(frozen=True)
class MoEConfig:
    """Experts, each a small MLP of width `hidden`; a router sends every token to `per_token` of them."""

    experts: int
    per_token: int
    hidden: int
    act: str = "silu"
    rule: RouteRule = field(default_factory=RouteRule)


@dataclass(frozen=True)
class LayerConfig:
    attention: AttentionConfig
    feed_forward: MLPConfig | MoEConfig
    post_norms: bool = False  # a second norm behind attention and behind the feed-forward (Gemma's sandwich)


@dataclass(frozen=True)
class ModelConfig:
    """A whole decoder. Sizes in numbers of floats; `context` in tokens."""

    vocab: int
    width: int
    layers: tuple[LayerConfig, ...]
    ropes: Mapping[str, RopeConfig]
    context: int
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # added to every norm's gain
    tied: bool = False  # the head is the embedding
    embed_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def caches(self) -> tuple[LayerCache, ...]:
        return tuple(layer.attention.cache for layer in self.layers)

    @classmethod
    def llama_like(
        cls,
        hf: Mapping,
        *,
        act: str | None = None,
        tied: bool = False,
        eps: float = 1e-6,
        ropes: Mapping[str, RopeConfig] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        qk_norm: bool = False,
        post_norms: bool = False,
        sliding: Callable[[int], bool] = lambda layer: False,
        feed_forward: Sequence[MLPConfig | MoEConfig] | None = None,
        **fields,
    ) -> ModelConfig:
        """The config of a model that is Llama but for a few fields.

        hf: config.json. Keyword arguments are the family's own facts, and the defaults that its config class has for
        what the file leaves out. ropes: "main", and "local" if layers with a window turn otherwise. sliding: which
        layers have the window, where the file has no layer_types. feed_forward: one a layer, where it is not the plain
        MLP. Raises BadFile and Unsupported for values that cannot be.
        """
        heads, kv_heads = groups(hf)
        d, bias = head_dim(hf), flag(hf, "attention_bias")
        ropes = ropes or {"main": rope(hf, d)}
        full = AttentionConfig(
            heads, kv_heads, d, AttentionSpec(scale or d**-0.5, softcap=softcap),
            qk_norm=qk_norm, bias=bias, output_bias=bias,
        )  # fmt: skip
        slides = sliding_layers(hf, sliding)
        attention = {False: full}
        if any(slides):
            spec = replace(full.spec, window=whole(hf, "sliding_window"))
            attention[True] = replace(full, rope="local" if "local" in ropes else "main", spec=spec)
        if feed_forward is None:
            plain = MLPConfig(whole(hf, "intermediate_size"), act or activation(hf), flag(hf, "mlp_bias"))
            feed_forward = [plain] * len(slides)
        return cls(
            vocab=whole(hf, "vocab_size"),
            width=whole(hf, "hidden_size"),
            layers=tuple(
                LayerConfig(attention[slide], f, post_norms) for slide, f in zip(slides, feed_forward, strict=True)
            ),
            ropes=ropes,
            context=whole(hf, "max_position_embeddings"),
            norm_eps=number(hf, "rms_norm_eps", eps),
            tied=flag(hf, "tie_word_embeddings", tied),
            **fields,
        )


def rope(hf: Mapping, head_dim: int, base: float = 10000.0) -> RopeConfig:
    """Positions from config.json, old keys (rope_theta, rope_scaling) and new (rope_parameters)."""
    rule = table(hf, "rope_parameters") or table(hf, "rope_scaling")
    base = number(rule, "rope_theta", number(hf, "rope_theta", base))
    share = number(rule, "partial_rotary_factor", number(hf, "partial_rotary_factor", 1.0))
    dim = int(head_dim * share)
    if share > 1 or dim < 2 or dim % 2:
        raise contradiction(f"The config has heads of {head_dim}, of which {head_dim * share:g} cannot turn in pairs.")
    found = RopeConfig(dim, base, rule)
    found.frequencies()  # asked now, so that what cannot be is said before the weights are read
    return found
