"""What a model will take of the machine's memory, worked out before it is read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from ..backends.base import Backend, Footprint, LayerCache, StateCache
from ..errors import OnDeviceError
from ..machine import free_bytes, memory_bytes, used_bytes
from ..models.config import ModelConfig, MoEConfig
from ..models.parameters import Parameters
from ..schemes import outline, row
from ..tensors import STORAGE, Affine, Stack, Tensor, blank

CHUNK = 512  # tokens that go through the model at once, at most: engine.PREFILL_CHUNK
TOKENIZER = 12_000_000, 600  # bytes: libraries that it loads, and for each token of the vocabulary
FEWER_BITS = 8, 4, 3, 2  # what is tried when a model does not fit
GROUP = 64
ROUND = 256  # contexts that are suggested are multiples of it


@dataclass(frozen=True)
class Plan:
    """Bytes. weights: memory of their own. mapped: pages of the file that they are used from; idle: those of them that
    belong to experts which a token leaves alone, and may be elsewhere. cache: for `context` tokens of `batch` texts.
    activations: while a piece of a prompt goes through. base: the program, its libraries and the tokenizer.
    device: what the device has of its own, None where all lives in the machine's memory."""

    weights: int
    mapped: int
    idle: int
    cache: int
    activations: int
    base: int
    context: int
    batch: int
    device: int | None = None

    @property
    def total(self) -> int:
        """All of it, the most that there will be at once."""
        return self.weights + self.mapped + self.cache + self.activations + self.base

    @property
    def needed(self) -> int:
        """What must fit where the weights live."""
        host = 0 if self.device else self.base
        return self.weights + self.mapped - self.idle + self.cache + self.activations + host


class Planner:
    """What one model takes on one backend. tensors: every parameter, blank ones will do. copied: those which are put
    together or turned around when they are read, and so leave their file whatever the backend would do."""

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Tensor], ops: Backend, kv_dtype: str | None = None,
        copied: Collection[str] = (),
    ):  # fmt: skip
        self.config, self.tensors, self.ops, self.kv_dtype, self.copied = config, tensors, ops, kv_dtype, copied

    @classmethod
    def of(cls, config: ModelConfig, parameters: Parameters, ops: Backend, kv_dtype: str | None = None) -> Planner:
        """From a checkpoint, of which nothing but headers is read."""
        return cls(
            config, tensors_of(parameters), ops, kv_dtype, [n for n in parameters if not _as_stored(parameters, n)]
        )

    def plan(self, context: int, batch: int = 1) -> Plan:
        """context: tokens of each of `batch` texts."""
        weights = mapped = idle = 0
        for name, tensor in self.tensors.items():
            took = self.ops.footprint(tensor)
            took = Footprint(sum(took)) if name in self.copied else took
            weights, mapped = weights + took.held, mapped + took.mapped
            idle += int(took.mapped * idle_share(self.config, name, tensor))
        return Plan(
            weights,
            mapped,
            idle,
            cache_bytes(self.config, self.ops, context, batch, self.kv_dtype),
            _activations(self.config, self.tensors, self.ops, min(CHUNK, context) * batch, batch),
            used_bytes() + TOKENIZER[0] + TOKENIZER[1] * self.config.vocab,
            context,
            batch,
            self.ops.device_memory(),
        )

    def require(self, context: int, what: str, say: Callable[[str], None] = lambda text: None) -> None:
        """Refuses, before anything is read, what could only swap the machine to a standstill, and says what would fit.
        `say` hears of what other programs have to make room for. Raises OnDeviceError."""
        wanted = self.plan(context)
        most, free = wanted.device or memory_bytes(), None if wanted.device else free_bytes()
        if most is None or wanted.needed <= most:
            if free is not None and wanted.needed - wanted.base > free:
                say(f"{what} needs {_told(wanted.needed)}; {_told(free)} are free: close other programs if it is slow.")
            return
        fits = "; or ".join(f"{how} ({_told(plan.needed)})" for how, plan in self.fitting(most, context))
        where = "the device" if wanted.device else "this machine"
        raise OnDeviceError(
            f"{what} needs {_told(wanted.needed)} for a context of {context} tokens; {where} has {_told(most)}.",
            f"What would fit: {fits}." if fits else "Take a smaller model.",
        )

    def fitting(self, most: int, context: int, batch: int = 1) -> Iterator[tuple[str, Plan]]:
        """What would fit in `most` bytes: the longest shorter context, and the most bits at this one."""
        low, high = 0, context // ROUND
        while low < high:
            middle = -(-(low + high) // 2)
            fits = self.plan(middle * ROUND, batch).needed <= most
            low, high = (middle, high) if fits else (low, middle - 1)
        if low:
            yield f"--context {low * ROUND}", self.plan(low * ROUND, batch)
        for bits in FEWER_BITS:
            tensors = quantized(self.tensors, bits)
            fewer = Planner(self.config, tensors, self.ops, self.kv_dtype, self.copied).plan(context, batch)
            if fewer.needed <= most:
                yield f"the model in {bits} bits", fewer
                return


def _as_stored(parameters: Parameters, name: str) -> bool:
    """Whether a parameter is one tensor of the file, or read from it expert by expert: not part of another, not
    transposed."""
    found = parameters.stored(name)
    if parameters.comes_apart(name):
        return True
    return len(found) == 1 and parameters.checkpoint.outline(found[0]).shape == parameters.shapes[name]


def tensors_of(parameters: Parameters) -> dict[str, Tensor]:
    """Every parameter's shape and format, without reading it."""
    found = {}
    for name, shape in parameters.shapes.items():
        form = parameters.checkpoint.outline(parameters.stored(name)[0]).format
        found[name] = _apart(outline(shape, form)) if parameters.comes_apart(name) else outline(shape, form)
    return found


def _apart(tensor: Tensor) -> Stack:
    """Experts that are read one by one."""
    one = row(tensor, 0)
    return Stack(tensor.shape[0], lambda index: one)


def idle_share(config: ModelConfig, name: str, tensor: Tensor) -> float:
    """Of an expert stack: what one token does not touch."""
    if ".moe." not in name or len(tensor.shape) < 3:
        return 0.0
    routed = config.layers[int(name.split(".")[1])].feed_forward
    return 1 - routed.per_token / routed.experts if isinstance(routed, MoEConfig) else 0.0


def cache_bytes(config: ModelConfig, ops: Backend, context: int, batch: int = 1, kv_dtype: str | None = None) -> int:
    """As the backend sets it aside: asked of a small one. A backend whose cache grows with the text says nothing yet;
    then it is what keys and values take."""
    if "cache" not in ops.features:
        return 0
    states = [spec for spec in config.caches if isinstance(spec, StateCache)]
    growing = [spec for spec in config.caches if isinstance(spec, LayerCache)]
    fixed = ops.new_cache(states, batch, ROUND, kv_dtype).nbytes if states else 0
    grown = ops.new_cache(growing, 1, 16, kv_dtype).nbytes_of(-(-context // 16) * 16) if growing else 0
    if grown:
        return fixed + grown * batch
    width = STORAGE[kv_dtype or ("float32" if ops.exact else ops.info().dtype)].itemsize
    scales = sum(8 * spec.kv_heads for spec in growing) if kv_dtype == "int8" else 0
    return fixed + (sum(kv_numbers(spec) for spec in growing) * width + scales) * context * batch


def bytes_per_token(config: ModelConfig, ops: Backend, kv_dtype: str | None = None) -> float:
    """By which a cache grows with each token of context."""
    one, two = (cache_bytes(config, ops, many * ROUND, 1, kv_dtype) for many in (1, 2))
    return (two - one) / ROUND


def kv_numbers(spec: LayerCache) -> int:
    """Numbers that a layer keeps of each token."""
    return spec.kv_heads * (spec.key_dim + spec.value_dim)


def _activations(config: ModelConfig, tensors: Mapping[str, Tensor], ops: Backend, tokens: int, batch: int) -> int:
    """While `tokens` go through the widest half of a layer: what its linear maps make, beside the stream, its norm, and
    the sum that comes of it; then the logits."""
    made: dict[str, int] = {}
    for name, tensor in tensors.items():
        if not name.startswith("layers.") or len(tensor.shape) < 2:
            continue
        layer, half = name.split(".")[1:3]
        routed = config.layers[int(layer)].feed_forward
        times = 1 if len(tensor.shape) == 2 else routed.per_token if half == "moe" else tensor.shape[0]
        made[f"{layer}.{half}"] = made.get(f"{layer}.{half}", 0) + times * tensor.shape[-2]
    width = STORAGE[ops.info().dtype].itemsize
    return tokens * (4 * config.width + max(made.values(), default=0)) * width + 2 * batch * config.vocab * 4


def quantized(tensors: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """The same parameters, blank, with every matrix that takes more bits in so many."""
    return {name: _fewer(tensor, bits) for name, tensor in tensors.items()}


def _fewer(tensor: Tensor, bits: int) -> Tensor:
    form = Affine(bits, GROUP, "float16")
    if len(tensor.shape) < 2 or tensor.shape[-1] % GROUP:
        return tensor
    fewer = blank(tensor.shape, form)
    fewer = _apart(fewer) if isinstance(tensor, Stack) else fewer
    return fewer if fewer.nbytes < tensor.nbytes else tensor


def _told(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"
