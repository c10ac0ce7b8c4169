"""What is left of a model: which tokens, layers, channels, heads and experts stay, and every tensor cut to that."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np

from ...errors import OnDeviceError, Unsupported
from ...models.config import (
    AttentionConfig,
    ConvolutionConfig,
    DeltaConfig,
    LayerConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
)
from ...schemes import LEGACY_BITS, label, take_rows, to_affine, to_dense
from ...tensors import Blocks, Dense, Tensor, store

Chosen = Mapping[int, np.ndarray]  # layer of the original -> indices that stay, ascending


@dataclass(frozen=True)
class Cut:
    """config: of the original. tokens: old ids that stay; None: all. layers: that stay, as the original counts them.
    channels (of the feed-forward), heads (of keys and values, each with its queries), experts: by layer of the
    original; a layer that is not there keeps all. tensors: parameters that change beyond that, by the original's
    names, in the original's shapes. dtype: what stays quantized becomes this; None: it stays."""

    config: ModelConfig
    layers: tuple[int, ...]
    tokens: np.ndarray | None = None
    channels: Chosen = field(default_factory=dict)
    heads: Chosen = field(default_factory=dict)
    experts: Chosen = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    dtype: str | None = None

    @classmethod
    def nothing(cls, config: ModelConfig, dtype: str | None = None) -> Cut:
        return cls(config, tuple(range(len(config.layers))), dtype=dtype)

    @property
    def made(self) -> ModelConfig:
        """The config of what is left."""
        vocab = self.config.vocab if self.tokens is None else len(self.tokens)
        return replace(self.config, vocab=vocab, layers=tuple(self._layer(i) for i in self.layers))

    def _layer(self, i: int) -> LayerConfig:
        layer = self.config.layers[i]
        mixer, f = layer.mixer, layer.feed_forward
        if i in self.heads:
            kv = len(self.heads[i])
            mixer = replace(mixer, heads=kv * (mixer.heads // mixer.kv_heads), kv_heads=kv)
        if i in self.channels:
            f = replace(f, hidden=len(self.channels[i]))
        if i in self.experts:
            f = replace(f, experts=len(self.experts[i]))
        return replace(layer, mixer=mixer, feed_forward=f)

    def original(self, name: str) -> str:
        """Where one of the new parameters comes from."""
        if not name.startswith("layers."):
            return name
        _, i, rest = name.split(".", 2)
        return f"layers.{self.layers[int(i)]}.{rest}"

    def load(self, parameters: Mapping[str, Tensor], name: str) -> Tensor:
        """One of the new parameters."""
        source = self.original(name)
        tensor = self.tensors.get(source)
        tensor = stored(parameters[source] if tensor is None else tensor, self.dtype)
        for axis, indices in self.picks(source):
            tensor = take(tensor, axis, indices)
        return tensor

    def picks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """(axis, indices) for each axis of the original's parameter that is cut."""
        if not name.startswith("layers."):
            if self.tokens is not None and name in ("embed", "head", "head.bias"):
                yield 0, self.tokens
            return
        _, number, part, *rest = name.split(".")
        i, rest = int(number), ".".join(rest)
        layer = self.config.layers[i]
        if part == "mlp" and i in self.channels:
            yield from mlp_picks(layer.feed_forward, rest, self.channels[i])
        if part == "attn" and i in self.heads:
            yield from attention_picks(layer.mixer, rest, self.heads[i])
        if part == "moe" and i in self.experts and not rest.startswith("shared"):
            yield 0, self.experts[i]


def mlp_picks(cfg: MLPConfig, part: str, channels: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    if part == "down":
        yield 1, channels
    elif part.startswith("gate_up"):
        yield 0, np.concatenate([channels, cfg.hidden + channels])
    elif part != "down.bias":
        yield 0, channels


def attention_picks(cfg: AttentionConfig, part: str, heads: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """heads: of keys and values; queries go with theirs."""
    d, group = cfg.head_dim, cfg.heads // cfg.kv_heads
    queries, keys = spread(heads, group * d), spread(heads, d)
    if part == "o":
        yield 1, queries
    elif part in ("q", "q.bias") and cfg.gated:
        yield 0, spread(heads, 2 * group * d)
    elif part in ("q", "q.bias") or (part.startswith("q_norm") and cfg.qk_norm == "width"):
        yield 0, queries
    elif part == "sinks":
        yield 0, spread(heads, group)
    elif part in ("k", "v", "k.bias", "v.bias") or (part.startswith("k_norm") and cfg.qk_norm == "width"):
        yield 0, keys
    elif part in ("qkv", "qkv.bias"):
        if cfg.qkv == "grouped":
            yield 0, spread(heads, (group + 2) * d)
        else:
            k, v = cfg.heads * d, (cfg.heads + cfg.kv_heads) * d
            yield 0, np.concatenate([queries, k + keys, v + keys])


def spread(indices: np.ndarray, width: int) -> np.ndarray:
    """Indices of groups -> of their members, `width` each."""
    return (np.asarray(indices)[:, None] * width + np.arange(width)).reshape(-1)


def take(tensor: Tensor, axis: int, indices: np.ndarray) -> Tensor:
    """Some of a tensor along one axis. Raises Unsupported across the groups of quantized rows."""
    if axis == 0:
        return take_rows(tensor, indices)
    require_dense(tensor)
    values = np.take(tensor.parts["weight"], indices, axis)
    return Tensor(values.shape, tensor.format, {"weight": values})


def require_dense(tensor: Tensor) -> None:
    if not isinstance(tensor.format, Dense):
        raise Unsupported(
            f"This model is quantized ({label(tensor.format)}); what is to go cuts through its groups.",
            "Prune the original weights, or add --dequantize to work on what these stand for.",
        )


def stored(tensor: Tensor, dtype: str | None) -> Tensor:
    """As a Hugging Face folder has a place for it. dtype: for what is quantized; None: codes are kept."""
    form = tensor.format
    if isinstance(form, Dense):
        return tensor
    if dtype is not None:
        return to_dense(tensor, dtype)
    require_place(tensor)
    return to_affine(tensor) if isinstance(form, Blocks) else tensor


def require_place(tensor: Tensor) -> None:
    form = tensor.format
    if isinstance(form, Blocks) and form.kind not in LEGACY_BITS:
        raise Unsupported(
            f"A folder has no exact place for {form.kind}.", "Add --dequantize to write what these codes stand for."
        )


def rounded(values: np.ndarray, like: Tensor) -> Tensor:
    """float32 values in the type of a tensor; bfloat16 in the place of a quantized one."""
    dtype = like.format.dtype if isinstance(like.format, Dense) else "bfloat16"
    return Tensor(values.shape, Dense(dtype), {"weight": store(values, dtype)})


# ------------------------------------------------------------------------------------------------ config.json


SIZES = {  # what a config.json calls it, in one family or another
    "tokens": ("vocab_size",),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "channels": ("intermediate_size", "n_inner", "ffn_dim"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "key heads": ("num_key_value_heads",),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts"),
}

NAMED = ("mlp_only_layers", "full_attn_idxs", "moe_layers")  # lists of layers
FIRST = ("first_k_dense_replace", "num_dense_layers")  # how many layers at the bottom are of another kind
SHARED_WIDTH = ("gpt2", "gpt_neox", "stablelm", "olmoe", "lfm2")  # whose classes know no head_dim of its own


def hugging_face(cut: Cut, hf: Mapping[str, Any], read) -> dict[str, Any]:
    """The config.json of what is left. read: the family's config.json -> ModelConfig, which must see the same.
    Raises Unsupported where this family's file cannot say it."""
    old, new = sizes(cut.config), sizes(cut.made)
    made = {key: _per_layer(key, value, cut) for key, value in hf.items()}
    for what, keys in SIZES.items():
        if old[what] != new[what] is not None:  # of a kind of which none is left, the file says what it said
            made |= {key: new[what] for key in keys if key in hf and hf[key] in (old[what], None)}
    if cut.heads and hf.get("model_type") in SHARED_WIDTH:
        raise Unsupported(
            f"Heads of {hf['model_type']} models share the whole width, in transformers at least.", "Leave --heads out."
        )
    if cut.heads:
        made |= {"head_dim": _attentions(cut.made)[0].head_dim, "num_key_value_heads": new["key heads"]}
    for candidate in _candidates(made, cut.made):
        if _sees(read, candidate, cut.made):
            return candidate
    raise Unsupported(
        f"A config.json of type {hf.get('model_type')!r} has no words for what would be left.",
        "Cut all layers alike, or prune something else.",
    )


def _candidates(hf: Mapping[str, Any], made: ModelConfig) -> Iterator[dict[str, Any]]:
    """The same file, and then with as few more words as will do for layers of which the family has a rule by number."""
    dense = [i for i, layer in enumerate(made.layers) if isinstance(layer.feed_forward, MLPConfig)]
    more: list[dict[str, Any]] = [{"layer_types": [_kind(layer) for layer in made.layers]}]
    if "decoder_sparse_step" in hf:
        more.append({"decoder_sparse_step": 1, "mlp_only_layers": dense})
    if "interleave_moe_layer_step" in hf:
        more.append({"moe_layers": [i for i in range(len(made.layers)) if i not in dense]})
    if "no_rope_layer_interval" in hf:
        more.append({"no_rope_layers": [int(getattr(layer.mixer, "rope", None) is not None) for layer in made.layers]})
    if "block_auto_adjust_ff_dim" in hf:  # a width that the file's would be worked out to
        widths = {key: sizes(made)["channels"] for key in ("intermediate_size", "block_ff_dim") if key in hf}
        more.append({"block_auto_adjust_ff_dim": False, **widths})
    for count in range(len(more) + 1):
        for chosen in combinations(more, count):
            yield dict(ChainMap(*chosen, dict(hf)))


def _kind(layer: LayerConfig) -> str:
    """What transformers' layer_types call it."""
    if isinstance(layer.mixer, ConvolutionConfig | DeltaConfig):
        return "conv" if isinstance(layer.mixer, ConvolutionConfig) else "linear_attention"
    spec = layer.mixer.spec
    return "sliding_attention" if spec.window else "chunked_attention" if spec.chunk else "full_attention"


def _sees(read, hf: Mapping[str, Any], wanted: ModelConfig) -> bool:
    try:
        return read(hf) == wanted
    except OnDeviceError:  # a candidate that the family refuses is none
        return False


def sizes(cfg: ModelConfig) -> dict[str, int | None]:
    """How many there are of each kind of part, in a layer where layers have them; None: this model has none."""
    first = next(iter(_attentions(cfg)), None)
    plain = next((f.hidden for layer in cfg.layers if isinstance(f := layer.feed_forward, MLPConfig)), None)
    experts = next((f.experts for layer in cfg.layers if isinstance(f := layer.feed_forward, MoEConfig)), None)
    return {
        "tokens": cfg.vocab, "layers": len(cfg.layers), "channels": plain, "heads": first and first.heads,
        "key heads": first and first.kv_heads, "experts": experts,
    }  # fmt: skip


def _attentions(cfg: ModelConfig) -> list[AttentionConfig]:
    return [layer.mixer for layer in cfg.layers if isinstance(layer.mixer, AttentionConfig)]


def _per_layer(key: str, value: Any, cut: Cut) -> Any:
    """Lists with an entry a layer, lists of layers, and numbers of the first layers."""
    if key in FIRST and type(value) is int:
        return sum(i < value for i in cut.layers)
    if not isinstance(value, list):
        return value
    if key in NAMED:
        return [at for at, i in enumerate(cut.layers) if i in value]
    return [value[i] for i in cut.layers] if len(value) == len(cut.config.layers) else value
