"""What a model is made of: frozen dataclasses every quirk of a family is a field with a neutral default, so that Llama is
"no flags". Nothing here knows a family's name or a backend."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..backends.base import AttentionSpec, LayerCache, RouteRule
from ..errors import BadFile, Unsupported


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions: `dim` of a head's dimensions turn, at `base`; `scaling` as in HF's rope_parameters."""

    dim: int
    base: float = 10000.0
    scaling: Mapping | None = None
    interleaved: bool = False

    def frequencies(self) -> tuple[np.ndarray, float]:
        """Inverse frequencies [dim / 2] float32, and the factor on sine and cosine."""
        exponents = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        freqs = (1.0 / np.float32(self.base) ** exponents).astype(np.float32)
        rule = dict(self.scaling or {})
        kind = rule.get("rope_type", rule.get("type", "default"))
        if kind == "default":
            return freqs, 1.0
        if kind == "linear":
            return (freqs / np.float32(rule["factor"])).astype(np.float32), 1.0
        if kind == "llama3":
            return _llama3(freqs, rule), 1.0
        raise Unsupported(
            f"The config asks for rope type {kind!r}, which is not known here.", "Known: default, linear, llama3."
        )


def _llama3(freqs: np.ndarray, rule: Mapping) -> np.ndarray:
    """Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    low, high = rule["low_freq_factor"], rule["high_freq_factor"]
    old = rule["original_max_position_embeddings"]
    wavelength = 2 * math.pi / freqs
    blend = np.clip((old / wavelength - low) / (high - low), 0.0, 1.0)
    return ((1 - blend) * freqs / rule["factor"] + blend * freqs).astype(np.float32)


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
        qk_norm: bool = False,
        bias: bool = False,
        act: str | None = None,
        tied: bool = False,
        base: float = 10000.0,
        eps: float = 1e-6,
        feed_forward: tuple[MLPConfig | MoEConfig, ...] | None = None,
        **fields,
    ) -> ModelConfig:
        """The config of a model that is Llama but for a few fields.

        hf: config.json. Keyword arguments are the family's own facts and the defaults its config class has for what
        the file leaves out; `feed_forward`: one a layer, where it is not the plain MLP.
        """
        count, heads = need(hf, "num_hidden_layers"), need(hf, "num_attention_heads")
        kv_heads = hf.get("num_key_value_heads") or heads
        head_dim = hf.get("head_dim") or need(hf, "hidden_size") // heads
        if heads % kv_heads:
            raise BadFile(
                f"config.json says num_attention_heads = {heads} and num_key_value_heads = {kv_heads}.",
                "The first must be a multiple of the second.",
            )
        window = hf.get("sliding_window") if hf.get("use_sliding_window", True) else None
        plain = MLPConfig(need(hf, "intermediate_size"), act or activation(hf), hf.get("mlp_bias", False))
        bias = hf.get("attention_bias", bias)
        attention = AttentionConfig(
            heads,
            kv_heads,
            head_dim,
            AttentionSpec(head_dim**-0.5, window),
            qk_norm=qk_norm,
            bias=bias,
            output_bias=bias,
        )
        return cls(
            vocab=need(hf, "vocab_size"),
            width=need(hf, "hidden_size"),
            layers=tuple(LayerConfig(attention, f) for f in feed_forward or (plain,) * count),
            ropes={"main": rope(hf, head_dim, base)},
            context=need(hf, "max_position_embeddings"),
            norm_eps=hf.get("rms_norm_eps", eps),
            tied=hf.get("tie_word_embeddings", tied),
            **fields,
        )


def rope(hf: Mapping, head_dim: int, base: float = 10000.0) -> RopeConfig:
    """Positions from config.json, old keys (rope_theta, rope_scaling) and new (rope_parameters)."""
    rule = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    base = rule.get("rope_theta") or hf.get("rope_theta") or base
    share = rule.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    return RopeConfig(int(head_dim * share), float(base), rule)


ACTIVATIONS = {  # Hugging Face's names -> the contract's
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "relu": "relu", "relu2": "relu2",
}  # fmt: skip


def activation(hf: Mapping, key: str = "hidden_act", default: str = "silu") -> str:
    kind = hf.get(key, default)
    if kind not in ACTIVATIONS:
        raise Unsupported(f"config.json asks for the activation {kind!r}.", f"Known: {', '.join(sorted(ACTIVATIONS))}.")
    return ACTIVATIONS[kind]


def need(hf: Mapping, key: str) -> int:
    """A size that config.json must hold: a positive whole number, else BadFile."""
    value = hf.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise BadFile(
            f"config.json has {key} = {value!r}; a positive whole number is needed.", "Fetch the model again."
        )
    return value
