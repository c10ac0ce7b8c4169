"""Which parameters a model has, and where each stands in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..backends.base import Backend, W
from ..checkpoint import Checkpoint, release
from ..errors import BadFile
from ..schemes import row, stack, to_float
from ..tensors import Stack, Tensor, dense
from .config import (
    AttentionConfig,
    ConvolutionConfig,
    DeltaConfig,
    LatentConfig,
    LayerConfig,
    Mixer,
    MLPConfig,
    ModelConfig,
    MoEConfig,
)
from .families import Family, NameMap, text_part
from .families.gguf import guessing
from .families.views import viewed, viewed_shape

if TYPE_CHECKING:
    from ..checkpoint.quantized import AnyEntry

Shapes = dict[str, tuple[int, ...]]
AT_ONCE = 16 << 20  # bytes of the checkpoint that are read before their memory is given back


def expected(cfg: ModelConfig) -> Shapes:
    """Our name -> shape, for every parameter of the model."""
    shapes: Shapes = {"embed": (cfg.vocab, cfg.width)}
    if cfg.positions:
        shapes["positions"] = (cfg.positions, cfg.width)
    if not cfg.tied:
        shapes["head"] = (cfg.vocab, cfg.width)
    if cfg.head_bias:
        shapes["head.bias"] = (cfg.vocab,)
    shapes |= _norm(cfg, "norm")
    for i, layer in enumerate(cfg.layers):
        f = layer.feed_forward
        of_layer = _norms(cfg, layer) | _mixer(layer.mixer, cfg.width)
        of_layer |= _moe(f, cfg.width) if isinstance(f, MoEConfig) else _mlp(f, cfg.width, "mlp")
        shapes |= {f"layers.{i}.{name}": shape for name, shape in of_layer.items()}
    return shapes


def _norm(cfg: ModelConfig, name: str) -> Shapes:
    if cfg.norm == "bare":
        return {}
    return {name: (cfg.width,)} | ({f"{name}.bias": (cfg.width,)} if cfg.norm_bias else {})


def _norms(cfg: ModelConfig, layer: LayerConfig) -> Shapes:
    """Those around the two halves of a block."""
    pre = () if not layer.pre_norms else ("attn_norm",) if layer.shared_norm else ("attn_norm", "mlp_norm")
    names = (*pre, *(("attn_post_norm", "mlp_post_norm") if layer.post_norms else ()))
    return {key: shape for name in names for key, shape in _norm(cfg, name).items()}


def _mixer(mixer: Mixer, width: int) -> Shapes:
    if isinstance(mixer, ConvolutionConfig):
        return _convolution(mixer, width)
    if isinstance(mixer, LatentConfig):
        return _latent(mixer, width)
    return _delta(mixer, width) if isinstance(mixer, DeltaConfig) else _attention(mixer, width)


def _latent(c: LatentConfig, width: int) -> Shapes:
    q = c.heads * (c.nope + c.turning)
    shapes: Shapes = {"q": (q, width)}
    if c.query_latent:
        shapes = {"q_down": (c.query_latent, width), "q_norm": (c.query_latent,), "q_up": (q, c.query_latent)}
    shapes |= {"kv_down": (c.latent + c.turning, width), "kv_norm": (c.latent,)}
    shapes |= {"k_up": (c.heads, c.nope, c.latent), "v_up": (c.heads, c.value_dim, c.latent)}
    shapes["o"] = (width, c.heads * c.value_dim)
    return {f"latent.{name}": shape for name, shape in shapes.items()}


def _convolution(c: ConvolutionConfig, width: int) -> Shapes:
    shapes: Shapes = {"conv.in": (3 * c.width, width), "conv.taps": (c.width, c.taps), "conv.out": (width, c.width)}
    return shapes | ({f"{name}.bias": shape[:1] for name, shape in shapes.items()} if c.bias else {})


def _delta(d: DeltaConfig, width: int) -> Shapes:
    mixed = 2 * d.keys + d.values
    linear = {"qkv": mixed, "gate": d.values, "a": d.heads, "b": d.heads}
    if d.grouped:
        linear = {"qkv_gate": mixed + d.values, "b_a": 2 * d.heads}
    vectors = {"rate": d.heads, "shift": d.heads, "norm": d.value_dim}
    shapes: Shapes = {f"delta.{name}": (rows, width) for name, rows in linear.items()}
    shapes |= {f"delta.{name}": (size,) for name, size in vectors.items()}
    return shapes | {"delta.taps": (mixed, d.taps), "delta.out": (width, d.values)}


def _attention(a: AttentionConfig, width: int) -> Shapes:
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    rows = {"q": 2 * q if a.gated else q, "k": kv, "v": kv} if a.qkv == "separate" else {"qkv": q + 2 * kv}
    shapes: Shapes = {f"attn.{name}": (n, width) for name, n in rows.items()} | {"attn.o": (width, q)}
    if a.bias:
        shapes |= {f"attn.{name}.bias": (n,) for name, n in rows.items()}
    if a.output_bias:
        shapes["attn.o.bias"] = (width,)
    if a.sinks:
        shapes["attn.sinks"] = (a.heads,)
    if a.qk_norm in ("head", "heads", "width"):
        q, kv = (a.head_dim, a.head_dim) if a.qk_norm == "head" else (q, kv)
        shapes |= {"attn.q_norm": (q,), "attn.k_norm": (kv,)}
    return shapes


def _moe(f: MoEConfig, width: int) -> Shapes:
    up, down = (f.experts, f.hidden, width), (f.experts, width, f.hidden)
    shapes: Shapes = {"moe.gate": up, "moe.up": up, "moe.down": down}
    if f.bias:
        shapes |= {f"{name}.bias": shape[:2] for name, shape in shapes.items()}
    shapes["moe.router"] = (f.experts, width)
    vectors = {"moe.router.bias": f.router_bias, "moe.election": f.election}
    shapes |= {name: (f.experts,) for name, there in vectors.items() if there}
    if f.shared_gate:
        shapes["moe.shared_gate"] = (1, width)
    return shapes | (_mlp(f.shared, width, "moe.shared") if f.shared else {})


def _mlp(f: MLPConfig, width: int, name: str) -> Shapes:
    rows = {"gate_up": 2 * f.hidden} if f.gate == "fused" else {"gate": f.hidden, "up": f.hidden}
    if f.gate is None:
        del rows["gate"]
    shapes: Shapes = {f"{name}.{part}": (n, width) for part, n in rows.items()} | {f"{name}.down": (width, f.hidden)}
    return shapes | ({f"{part}.bias": shape[:1] for part, shape in shapes.items()} if f.bias else {})


def fit(
    names: NameMap, config: ModelConfig, checkpoint: Checkpoint
) -> tuple[dict[str, list[str]], dict[str, tuple[str, ...]], list[str], list[str]]:
    """Our name -> the checkpoint's (several: experts, one a tensor; []: it is missing); our name -> how it lies there;
    the checkpoint's tensors that nobody asks for; and those of what the model has besides."""
    found = {n: names.find(n, checkpoint, _several(config, n), shape) for n, shape in expected(config).items()}
    used = {n for stored, _ in found.values() for n in stored}
    behind = _guessing(config, checkpoint)
    apart = [n for n in checkpoint.names if n not in used and names.apart(n, behind)]
    unused = [n for n in checkpoint.names if n not in used and not names.ignored(n) and not names.apart(n, behind)]
    where, views = {n: stored for n, (stored, _) in found.items()}, {n: views for n, (_, views) in found.items()}
    return where, views, unused, apart


def _guessing(config: ModelConfig, checkpoint: Checkpoint) -> range:
    """Layers behind the last one that guess tokens further ahead (multi-token prediction, DeepSeek-AI 2024), which are
    stored as further layers of the model."""
    layers = len(config.layers)
    if checkpoint.kind == "gguf":
        return range(layers, layers + guessing(checkpoint.metadata))
    count = text_part(checkpoint.config).get("num_nextn_predict_layers")
    return range(layers, layers + (count if isinstance(count, int) else 0))


def _several(config: ModelConfig, name: str) -> int:
    """In how many tensors one of ours may lie: one an expert, or one a head."""
    if not name.startswith("layers."):
        return 1
    layer, kind = config.layers[int(name.split(".")[1])], name.split(".")[-1]
    if isinstance(layer.mixer, AttentionConfig) and kind in ("q_norm", "k_norm"):
        return layer.mixer.heads if kind == "q_norm" else layer.mixer.kv_heads
    return layer.feed_forward.experts if isinstance(layer.feed_forward, MoEConfig) else 1


class Parameters:
    """A checkpoint's tensors under our names, checked against the config: every mismatch is reported at once. apart:
    tensors of what the model has besides (eyes, ears, layers that guess further ahead), which nothing here uses."""

    def __init__(self, family: Family, config: ModelConfig, checkpoint: Checkpoint):
        self.shapes = expected(config)
        self.checkpoint = checkpoint
        self._family = family
        self._config = config
        self._names = family.gguf.names if checkpoint.kind == "gguf" else family.names
        self._where, self._views, unused, self.apart = fit(self._names, config, checkpoint)
        self._check(unused)
        self._raised = any("kernels" in views and self._filters(name) for name, views in self._views.items())

    def _filters(self, name: str) -> bool:
        """Whether a convolution's kernels lie as mlx-lm saves them."""
        shape = self.checkpoint.outline(self._where[name][0]).shape
        return len(shape) == 3 and shape[-1] == 1

    @property
    def left_out(self) -> str:
        """Of `apart`, for people; "" where there is none."""
        if not self.apart:
            return ""
        size = sum(self.checkpoint.outline(name).nbytes for name in self.apart)
        return (
            f"{len(self.apart)} tensors ({size / 1e6:.1f} MB, such as {self.apart[0]:.80}) are left out: they see, "
            "hear or guess several tokens ahead, which is not done here."
        )

    def _check(self, unused: list[str]) -> None:
        missing = [self._names.spell(name) for name, found in self._where.items() if not found]
        wrong = [f for name, found in self._where.items() for n in found if (f := self._fault(name, n, len(found)))]
        lists = {"missing": missing, "not used": unused, "wrong": wrong}
        problems = "; ".join(f"{what}: {_some(items)}" for what, items in lists.items() if items)
        if problems:
            raise BadFile(
                f"The tensors in {self.checkpoint.path} do not fit its config: {problems}.",
                "Fetch the model again, or check that its config belongs to these weights.",
            )

    def _fault(self, name: str, found: str, count: int) -> str | None:
        """What is wrong with one tensor of the checkpoint, one of `count` that make up ours."""
        tensor, shape = self.checkpoint.outline(found), self.shapes[name]
        if views := self._views[name]:
            seen = viewed_shape(tensor.shape, views, shape, name.endswith(".bias"))
            return None if seen == shape else f"{found} is {list(tensor.shape)}, which does not hold {list(shape)}"
        if count > 1 and len(shape) == 1:
            shape = (shape[0] // count,)  # one head's
        elif count > 1 or len(tensor.shape) == 2 < len(shape):
            shape = shape[1:]  # one expert's
        if tensor.shape != shape:
            return f"{found} is {list(tensor.shape)}, not {list(shape)}"
        if len(shape) == 1 and tensor.quantized:
            return f"{found} is quantized, which vectors never are"
        return None

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor in Hugging Face's arrangement ([out, in]), whatever file it came from. Experts are a `Stack`."""
        entries = [self.checkpoint.entry(n) for n in self._where[name]]
        if not self.comes_apart(name):
            return self._arranged(name, self.shapes[name], entries)
        count, *one = self.shapes[name]

        def entry(expert: int) -> AnyEntry:
            return entries[expert] if len(entries) > 1 else entries[0].row(expert)

        return Stack(
            count,
            lambda expert: row(self._arranged(name, (1, *one), [entry(expert)]), 0),
            lambda expert: release(*(place.load() for place in entry(expert).places)),
        )

    def comes_apart(self, name: str) -> bool:
        """Whether a parameter is the experts of a layer, of one format, which can be read one by one."""
        shape = self.shapes[name]
        if ".moe." not in name or len(shape) != 3:
            return False
        stored = [self.checkpoint.outline(n) for n in self._where[name]]
        if len({tensor.format for tensor in stored}) != 1:
            return False
        return len(stored) > 1 or (len(stored[0].shape) == 3 and stored[0].shape[0] == shape[0])

    def _arranged(self, name: str, shape: tuple[int, ...], entries: Sequence[AnyEntry]) -> Tensor:
        """Our tensor, of `shape`, from where it lies."""
        views = self._views[name]
        parts = [entry.load() for entry in entries]
        layer = int(name.split(".")[1]) if name.startswith("layers.") else None
        mixer = None if layer is None else self._config.layers[layer].mixer
        parts = [viewed(part, views, shape, name.endswith(".bias"), mixer) for part in parts]
        tensor = parts[0] if parts[0].shape == shape else stack(parts)
        if len(shape) == 1 < len(tensor.shape):  # heads' gains, end to end
            tensor = dense(to_float(tensor).ravel())
        if self._raised and self._names.raised(name):
            tensor = dense(to_float(tensor) - np.float32(1))
        arrange = self._family.gguf.arrange if self.checkpoint.kind == "gguf" else None
        return arrange(name, tensor, self._config) if arrange else tensor

    def stored(self, name: str) -> list[str]:
        """Where one of ours stands in the checkpoint: one name, or one an expert."""
        return self._where[name]

    def prepare(self, ops: Backend, progress: Callable[[int], None] = lambda done: None) -> dict[str, W]:
        """Every tensor through `ops.prepare`, once; progress is told the bytes of each."""
        weights: dict[str, W] = {}
        read: list[str] = []
        size = 0
        for name in self:
            tensor = self[name]
            weights[name] = ops.prepare(tensor)
            read += self.stored(name)
            size += tensor.nbytes
            if size > AT_ONCE:  # a weight that is used in place takes its pages again when it is used
                self.checkpoint.release(*read)
                read, size = [], 0
            progress(tensor.nbytes)
        self.checkpoint.release(*read)
        return weights


def _some(items: list[str], most: int = 12) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(item[:160] for item in items[:most]) + more
