"""What a model is made of: frozen dataclasses in which every quirk of a family is a field with a neutral default, so
that Llama is "no flags". Nothing here knows a family's name or a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..backends.base import AttentionSpec, LayerCache, RouteRule, StateCache
from .fields import activation, contradiction, flag, groups, head_dim, number, sliding_layers, whole
from .ropes import RopeConfig, rope


@dataclass(frozen=True)
class Sharpness:
    """Queries grow with their position: see Backend.sharpness."""

    every: int
    weight: float
    ahead: int = 0


@dataclass(frozen=True)
class AttentionConfig:
    """qk_norm: a norm of q and k in front of the positions (norm_turned: behind them): of each "head", each of the
    "heads" by gains of its own, or of all heads' "width" at once; "bare": of each head, without gains. qkv: how the
    three are stored: "separate", "fused" (rows of q, then k, then v), or "grouped" (the same within each key head).
    gated: q holds, for each head, its query and then a gate, by whose sigmoid the head's answer is multiplied
    ("separate" alone)."""

    heads: int
    kv_heads: int
    head_dim: int
    spec: AttentionSpec
    rope: str | None = "main"  # which of ModelConfig.ropes; None: no positions
    qk_norm: str | None = None
    norm_turned: bool = False
    qkv: str = "separate"
    gated: bool = False
    bias: bool = False  # on q, k and v
    output_bias: bool = False
    sharpness: Sharpness | None = None
    sinks: bool = False  # a learned score for each head that takes from its attention and gives nothing

    @property
    def cache(self) -> LayerCache:
        far = min(filter(None, (self.spec.window, self.spec.chunk)), default=None)
        return LayerCache(self.kv_heads, self.head_dim, self.head_dim, far)


@dataclass(frozen=True)
class ConvolutionConfig:
    """out(behind * convolution(before * x)), with before, behind and x from one linear map."""

    width: int
    taps: int
    bias: bool = False  # of both maps and the convolution

    @property
    def cache(self) -> StateCache:
        return StateCache(conv=(self.taps - 1, self.width))


@dataclass(frozen=True)
class DeltaConfig:
    """Gated DeltaNet: heads with a memory [key_dim, value_dim] each; several read one key head."""

    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    taps: int
    act: str = "silu"
    grouped: bool = False  # q, k, v and gate of each key head lie together, in one matrix, and so do b and a

    @property
    def group(self) -> tuple[int, int, int]:
        """How many numbers of q, of k and of v a key head has."""
        return self.key_dim, self.key_dim, self.values // self.key_heads

    @property
    def keys(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        return self.heads * self.value_dim

    @property
    def cache(self) -> StateCache:
        mixed = 2 * self.keys + self.values
        return StateCache(conv=(self.taps - 1, mixed), memory=(self.heads, self.key_dim, self.value_dim))


@dataclass(frozen=True)
class LatentConfig:
    """Attention over a latent that all heads share (multi-head latent attention). A head's keys have `nope` numbers
    made from the latent, and behind them `turning` that know their position and are the same for all heads.
    query_latent: the width that queries pass through; None: they come from x at once."""

    heads: int
    nope: int
    turning: int
    value_dim: int
    latent: int
    query_latent: int | None
    spec: AttentionSpec
    rope: str = "main"

    @property
    def cache(self) -> LayerCache:
        return LayerCache(1, self.latent + self.turning, 0)


Mixer = AttentionConfig | LatentConfig | ConvolutionConfig | DeltaConfig


@dataclass(frozen=True)
class MLPConfig:
    """down(act(gate(x)) * up(x)). gate: "separate", "fused" (rows of gate, then up, in one matrix), or None, where it
    is down(act(up(x)))."""

    hidden: int
    act: str = "silu"
    bias: bool = False
    gate: str | None = "separate"


@dataclass(frozen=True)
class MoEConfig:
    """Experts, each a small MLP of width `hidden`; a router sends every token to `per_token` of them. shared: an MLP
    that every token goes through besides, weighted by a gate of its own if `shared_gate`."""

    experts: int
    per_token: int
    hidden: int
    act: str = "silu"
    rule: RouteRule = field(default_factory=RouteRule)
    router_bias: bool = False
    election: bool = False  # a bias that counts in the election of experts alone
    bias: bool = False  # of every expert's maps
    up_act: str | None = None  # down(act(gate(x)) * (up_act(up(x)) + up_offset))
    up_offset: float = 0.0
    shared: MLPConfig | None = None
    shared_gate: bool = False


@dataclass(frozen=True)
class LayerConfig:
    """parallel: the feed-forward reads what attention reads, through its own norm or (shared_norm) the same."""

    mixer: Mixer
    feed_forward: MLPConfig | MoEConfig
    pre_norms: bool = True  # in front of attention and of the feed-forward
    post_norms: bool = False  # behind attention and behind the feed-forward
    parallel: bool = False
    shared_norm: bool = False
    residual_scale: float = 1.0  # of what each half adds


@dataclass(frozen=True)
class ModelConfig:
    """A whole decoder. Sizes in numbers of floats; `context` in tokens."""

    vocab: int
    width: int
    layers: tuple[LayerConfig, ...]
    ropes: Mapping[str, RopeConfig]
    context: int
    norm: str = "rms"  # or "layer", or "bare": a layer norm without gains
    norm_bias: bool = False
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # added to every norm's gain
    tied: bool = False  # the head is the embedding
    head_bias: bool = False
    positions: int = 0  # learned ones, added to the embedding
    embed_scale: float = 1.0  # of tokens' embeddings
    input_scale: float = 1.0  # of what goes into the first block, also where it is no token's embedding
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def caches(self) -> tuple[LayerCache | StateCache, ...]:
        return tuple(layer.mixer.cache for layer in self.layers)

    @classmethod
    def llama_like(
        cls,
        hf: Mapping,
        *,
        eps: float = 1e-6,
        tied: bool = False,
        ropes: Mapping[str, RopeConfig] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sliding: Callable[[int], bool] = lambda layer: False,
        turns: Callable[[int, bool], bool] = lambda layer, slides: True,
        local: Mapping[str, Any] | None = None,
        by_layer: Callable[[int, bool], Mapping[str, Any]] = lambda layer, slides: {},
        attention: Mapping[str, Any] | None = None,
        mixers: Callable[[int], Mixer | None] = lambda layer: None,
        mlp: Mapping[str, Any] | None = None,
        layer: Mapping[str, Any] | None = None,
        feed_forward: Callable[[int], MLPConfig | MoEConfig] | None = None,
        **fields,
    ) -> ModelConfig:
        """The config of a model that is Llama but for a few fields.

        hf: config.json. Keyword arguments are the family's own facts, and the defaults that its config class has for
        what the file leaves out. ropes: "main", and "local" if layers with a window turn otherwise. sliding: which
        layers have the window, where the file has no layer_types; turns: which have positions (by index, and whether
        there is a window). local: the fields of AttentionSpec by which layers with a window differ from those without,
        where it is not sliding_window. by_layer: the fields of AttentionConfig by which one layer differs. mixers: what
        a layer has in the place of attention. attention, mlp, layer: fields of AttentionConfig, MLPConfig and
        LayerConfig, the rest ModelConfig's. feed_forward: each layer's, where it is not the plain MLP. Raises BadFile
        and Unsupported for values that cannot be.
        """
        heads, kv_heads = groups(hf)
        d, bias = head_dim(hf), flag(hf, "attention_bias")
        ropes = {"main": rope(hf, d)} if ropes is None else ropes
        spec = AttentionSpec(scale or d**-0.5, softcap=softcap)
        biases = {"bias": bias, "output_bias": bias}
        full = AttentionConfig(heads, kv_heads, d, spec, **{**biases, **(attention or {})})
        slides = sliding_layers(hf, sliding)
        windowed = replace(spec, **(local or {"window": whole(hf, "sliding_window")})) if any(slides) else spec

        def attends(i: int, slide: bool) -> AttentionConfig:
            rope = ("local" if slide and "local" in ropes else "main") if ropes and turns(i, slide) else None
            return replace(full, **{"rope": rope, "spec": windowed if slide else spec, **by_layer(i, slide)})

        if feed_forward is None:
            plain = plain_mlp(hf, **(mlp or {}))
        return cls(
            vocab=whole(hf, "vocab_size"),
            width=whole(hf, "hidden_size"),
            layers=tuple(
                LayerConfig(mixers(i) or attends(i, slide), feed_forward(i) if feed_forward else plain, **(layer or {}))
                for i, slide in enumerate(slides)
            ),
            ropes=ropes,
            context=whole(hf, "max_position_embeddings"),
            tied=flag(hf, "tie_word_embeddings", tied),
            **{"norm_eps": number(hf, "rms_norm_eps", eps), **fields},
        )


def plain_mlp(hf: Mapping, **fields) -> MLPConfig:
    """The MLP of every layer as the file says, but for `fields`."""
    usual = {
        "hidden": lambda: whole(hf, "intermediate_size"),
        "act": lambda: activation(hf),
        "bias": lambda: flag(hf, "mlp_bias"),
    }
    return MLPConfig(**{name: read() for name, read in usual.items() if name not in fields}, **fields)


def routed(hf: Mapping, hidden: str, **fields) -> MoEConfig:
    """Experts as the file says, each as wide as its key `hidden` says, but for `fields`. Raises BadFile for more
    experts a token than there are."""
    key = next((key for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in hf), "num_experts")
    experts, per_token = whole(hf, key), whole(hf, "num_experts_per_tok")
    if per_token > experts:
        raise contradiction(f"The config has {experts} experts and num_experts_per_tok = {per_token}.")
    return MoEConfig(experts, per_token, whole(hf, hidden), **{"act": activation(hf), **fields})


def elected(
    hf: Mapping, *, shared: int = 0, groups: int = 1, top_groups: int = 1, scale: float = 1.0, **fields
) -> MoEConfig:
    """Experts elected by a sigmoid of their scores and a bias that counts in the election alone, from the best groups
    (DeepSeek-AI 2024); beside them an MLP for every token, as wide as `n_shared_experts` of them. Keyword arguments are
    what the family's config class has for keys that the file leaves out, and MoEConfig's fields. Raises BadFile for
    groups that experts cannot stand in."""
    rule = RouteRule(
        "sigmoid",
        groups=whole(hf, "n_group", groups),
        top_groups=whole(hf, "topk_group", top_groups),
        renormalise=flag(hf, "norm_topk_prob", True),
        scale=number(hf, "routed_scaling_factor", scale),
    )
    found = routed(
        hf, "moe_intermediate_size", **{"rule": rule, "election": True, "shared": shared_mlp(hf, shared), **fields}
    )
    each, rest = divmod(found.experts, rule.groups)
    if rest or rule.top_groups > rule.groups or (each < 2 and rule.groups > 1):
        raise contradiction(
            f"The config has {found.experts} experts in {rule.groups} groups, {rule.top_groups} at a time."
        )
    return found


def shared_mlp(hf: Mapping, count: int) -> MLPConfig | None:
    """The MLP for every token, as wide as `n_shared_experts` (`count`, where the file says nothing) experts are."""
    width = whole(hf, "n_shared_experts", count, least=0) * whole(hf, "moe_intermediate_size")
    return plain_mlp(hf, hidden=width) if width else None


def layer_norms(hf: Mapping, key: str = "layer_norm_eps") -> dict[str, Any]:
    """ModelConfig's fields for layer norms with biases; key: what the file calls their epsilon."""
    return {"norm": "layer", "norm_bias": True, "norm_eps": number(hf, key, 1e-5)}
