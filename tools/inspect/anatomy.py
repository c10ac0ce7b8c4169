"""Every parameter of a model, and what it counts towards: component, layer, weight or bias, bytes, active per token."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...checkpoint import Checkpoint
from ...models.config import ModelConfig, MoEConfig
from ...models.families import Family
from ...models.parameters import Parameters, expected
from ...schemes import AFFINE_BITS, label
from ...tensors import Affine, Dense, blank

EMBEDDINGS, HEAD, NORMS, ROUTER, EXPERTS = "embeddings", "head", "norms", "router", "experts"
MIXERS = {
    "attn": "attention",
    "latent": "attention",
    "mlp": "feed-forward",
    "conv": "convolution",
    "delta": "gated delta",
}  # the parts of a layer that go by another name
UNADAPTED = (".taps", ".k_up", ".v_up")  # a convolution's kernels; what latent attention takes whole
BUFFERS = (".moe.election",)  # moved by a rule of its own while a model is trained: nobody counts it as a parameter


@dataclass(frozen=True)
class Part:
    """One parameter. active: of its numbers, how many one token meets. nbytes and format: as stored."""

    name: str
    shape: tuple[int, ...]
    component: str
    layer: int | None
    active: int
    nbytes: int
    format: Dense | Any

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def bias(self) -> bool:
        return self.name.endswith(".bias")


@dataclass(frozen=True)
class Share:
    """Parameters with something in common. formats: for people, those of the matrices first."""

    name: str
    parameters: int
    active: int
    biases: int
    nbytes: int
    formats: tuple[str, ...]

    @property
    def bits(self) -> float:
        """Stored bits a parameter."""
        return 8 * self.nbytes / self.parameters

    @classmethod
    def of(cls, name: str, parts: Iterable[Part]) -> Share:
        parts = list(parts)
        bytes_in: Counter[str] = Counter()
        for part in parts:
            bytes_in[label(part.format)] += part.nbytes
        biases = sum(part.parameters for part in parts if part.bias)
        totals = (sum(getattr(p, what) for p in parts) for what in ("parameters", "active"))
        return cls(name, *totals, biases, sum(p.nbytes for p in parts), tuple(f for f, _ in bytes_in.most_common()))


@dataclass(frozen=True)
class Anatomy:
    parts: tuple[Part, ...]

    @property
    def whole(self) -> Share:
        return Share.of("all", self.parts)

    def components(self) -> list[Share]:
        """In the order in which a token meets them."""
        return self._by(lambda part: part.component)

    def layers(self) -> list[Share]:
        return self._by(lambda part: None if part.layer is None else str(part.layer))

    def _by(self, key: Callable[[Part], str | None]) -> list[Share]:
        names = dict.fromkeys(name for part in self.parts if (name := key(part)) is not None)
        return [Share.of(name, (p for p in self.parts if key(p) == name)) for name in names]

    def lora(self, rank: int) -> dict[str, int]:
        """What LoRA of this rank trains: two thin matrices [rank, in] and [out, rank] beside each one that is adapted
        (Hu et al. 2021), for the usual choices of matrices. Embeddings, head and routers stay as they are."""
        matrices = [p for p in self.parts if p.layer is not None and len(p.shape) > 1 and not p.bias]
        matrices = [p for p in matrices if not p.name.endswith(UNADAPTED)]
        counts = {p.name: math.prod(p.shape[:-2]) * rank * sum(p.shape[-2:]) for p in matrices}
        chosen = {"attention": [], "all linear": [], "experts too": []}
        for p in matrices:
            if p.component.startswith("attention"):
                chosen["attention"].append(p.name)
            if p.component not in (ROUTER, EXPERTS):
                chosen["all linear"].append(p.name)
            if p.component != ROUTER:
                chosen["experts too"].append(p.name)
        if chosen["experts too"] == chosen["all linear"]:
            del chosen["experts too"]
        return {name: sum(counts[n] for n in names) for name, names in chosen.items()}


def component(name: str) -> str:
    """What one of our names belongs to: layers.3.attn.q -> attention q."""
    path = name.removesuffix(".bias").split(".")
    path = path[2:] if path[0] == "layers" else path
    if "norm" in path[-1]:
        return NORMS
    if path[0].startswith(("embed", "pos")):
        return EMBEDDINGS
    if path[0] == "moe":
        return _of_experts(path[1])
    group = MIXERS.get(path[0], path[0])
    return f"{group} {path[-1]}" if group == "attention" else group


def _of_experts(part: str) -> str:
    if "shared" in part:
        return "shared experts"
    return EXPERTS if part in ("gate", "up", "down", "gate_up") else ROUTER


def anatomy(family: Family, config: ModelConfig, hf: Mapping[str, Any], checkpoint: Checkpoint | None) -> Anatomy:
    """checkpoint None: from the config alone; bytes are then what it says the weights are stored as. Raises BadFile
    where tensors and config do not fit."""
    shapes = expected(config)
    if checkpoint:
        stored = _stored(Parameters(family, config, checkpoint))
    else:
        blanks = {name: blank(shape, promised(name, shape, hf)) for name, shape in shapes.items()}
        stored = {name: (tensor.nbytes, tensor.format) for name, tensor in blanks.items()}
    counted = {name: shape for name, shape in shapes.items() if not name.endswith(BUFFERS)}
    return Anatomy(tuple(_part(name, shape, config, *stored[name]) for name, shape in counted.items()))


def _part(name: str, shape: tuple[int, ...], config: ModelConfig, nbytes: int, form: Any) -> Part:
    layer = int(name.split(".")[1]) if name.startswith("layers.") else None
    kind, active = component(name), math.prod(shape)
    if kind == EXPERTS and layer is not None:
        routed = config.layers[layer].feed_forward
        assert isinstance(routed, MoEConfig)
        active = active // routed.experts * routed.per_token
    return Part(name, shape, kind, layer, active, nbytes, form)


Stored = dict[str, tuple[int, Any]]  # our name -> bytes, format


def _stored(parameters: Parameters) -> Stored:
    """As the files have them. A tensor that several of ours are cut from counts for each by its size."""
    users: Counter[str] = Counter()
    for name in parameters:
        for found in parameters.stored(name):
            users[found] += math.prod(parameters.shapes[name])
    stored: Stored = {}
    for name in parameters:
        nbytes, size = 0.0, math.prod(parameters.shapes[name])
        for found in parameters.stored(name):
            tensor = parameters.checkpoint.outline(found)
            nbytes += tensor.nbytes * (1 if len(parameters.stored(name)) > 1 else size / users[found])
        stored[name] = round(nbytes), tensor.format
    return stored


def promised(name: str, shape: tuple[int, ...], hf: Mapping[str, Any]) -> Dense | Affine:
    """How a config says that a parameter is stored: in its dtype (bfloat16, where it says none), matrices in MLX's
    quantization where it has one."""
    dtype = hf.get("dtype") or hf.get("torch_dtype")
    plain = Dense(dtype if dtype in ("float32", "float16") else "bfloat16")
    rule = hf.get("quantization")
    bits, group = (rule.get("bits"), rule.get("group_size")) if isinstance(rule, Mapping) else (None, None)
    if bits not in AFFINE_BITS or type(group) is not int or group < 1 or len(shape) < 2 or name.endswith(".bias"):
        return plain
    return Affine(bits, group, plain.dtype) if shape[-1] % group == 0 else plain
