"""Which parameters a model has, and where each stands in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..backends.base import Backend, W
from ..checkpoint import Checkpoint
from ..errors import BadFile
from ..schemes import stack
from ..tensors import Tensor
from .config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig
from .families import Family

Shapes = dict[str, tuple[int, ...]]


def expected(cfg: ModelConfig) -> Shapes:
    """Our name -> shape, for every parameter of the model."""
    shapes: Shapes = {"embed": (cfg.vocab, cfg.width), "norm": (cfg.width,)}
    if not cfg.tied:
        shapes["head"] = (cfg.vocab, cfg.width)
    for i, layer in enumerate(cfg.layers):
        of_layer = {"attn_norm": (cfg.width,), "mlp_norm": (cfg.width,)}
        if layer.post_norms:
            of_layer |= {"attn_post_norm": (cfg.width,), "mlp_post_norm": (cfg.width,)}
        of_layer |= _attention(layer.attention, cfg.width) | _feed_forward(layer.feed_forward, cfg.width)
        shapes |= {f"layers.{i}.{name}": shape for name, shape in of_layer.items()}
    return shapes


def _attention(a: AttentionConfig, width: int) -> Shapes:
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    shapes: Shapes = {"attn.q": (q, width), "attn.k": (kv, width), "attn.v": (kv, width), "attn.o": (width, q)}
    if a.bias:
        shapes |= {"attn.q.bias": (q,), "attn.k.bias": (kv,), "attn.v.bias": (kv,)}
    if a.output_bias:
        shapes["attn.o.bias"] = (width,)
    if a.qk_norm:
        shapes |= {"attn.q_norm": (a.head_dim,), "attn.k_norm": (a.head_dim,)}
    return shapes


def _feed_forward(f: MLPConfig | MoEConfig, width: int) -> Shapes:
    if isinstance(f, MoEConfig):
        up, down = (f.experts, f.hidden, width), (f.experts, width, f.hidden)
        return {"moe.router": (f.experts, width), "moe.gate": up, "moe.up": up, "moe.down": down}
    shapes: Shapes = {"mlp.gate": (f.hidden, width), "mlp.up": (f.hidden, width), "mlp.down": (width, f.hidden)}
    if f.bias:
        shapes |= {"mlp.gate.bias": (f.hidden,), "mlp.up.bias": (f.hidden,), "mlp.down.bias": (width,)}
    return shapes


class Parameters:
    """A checkpoint's tensors under our names, checked against the config: every mismatch is reported at once."""

    def __init__(self, family: Family, config: ModelConfig, checkpoint: Checkpoint):
        self.shapes = expected(config)
        self.checkpoint = checkpoint
        self._family = family
        self._config = config
        self._names = family.gguf.names if checkpoint.kind == "gguf" else family.names
        self._where = self._locate()
        self._check()

    def _locate(self) -> dict[str, list[str]]:
        """Our name -> the checkpoint's names (several: experts, one a tensor)."""
        experts = {f.feed_forward.experts for f in self._config.layers if isinstance(f.feed_forward, MoEConfig)}
        count = max(experts, default=0)
        return {name: self._names.find(name, self.checkpoint, count) for name in self.shapes}

    def _check(self) -> None:
        missing = [self._names.spell(name) for name, found in self._where.items() if not found]
        used = {n for found in self._where.values() for n in found}
        unused = [n for n in self.checkpoint.names if n not in used and not self._names.ignored(n)]
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
        tensor, shape = self.checkpoint[found], self.shapes[name]
        if count > 1 or len(tensor.shape) == 2 < len(shape):
            shape = shape[1:]  # one expert's
        if tensor.shape != shape:
            return f"{found} is {list(tensor.shape)}, not {list(shape)}"
        if len(shape) == 1 and tensor.quantized:
            return f"{found} is quantized, which vectors never are"
        return None

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor in Hugging Face's arrangement, whatever file it came from."""
        parts = [self.checkpoint[n] for n in self._where[name]]
        tensor = parts[0] if len(parts[0].shape) == len(self.shapes[name]) else stack(parts)
        arrange = self._family.gguf.arrange if self.checkpoint.kind == "gguf" else None
        return arrange(name, tensor, self._config) if arrange else tensor

    def stored(self, name: str) -> list[str]:
        """Where one of ours stands in the checkpoint: one name, or one an expert."""
        return self._where[name]

    def prepare(self, ops: Backend, progress: Callable[[int], None] = lambda done: None) -> dict[str, W]:
        """Every tensor through `ops.prepare`, once; progress is told the bytes of each."""
        weights = {}
        for name in self:
            tensor = self[name]
            weights[name] = ops.prepare(tensor)
            progress(tensor.nbytes)
        return weights


def _some(items: list[str], most: int = 12) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(item[:160] for item in items[:most]) + more
