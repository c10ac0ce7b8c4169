"""THE CONTRACT: about thirty coarse operations that say everything a model needs of a machine.

A backend is an object; several may live in one process. `backends/reference.py` is the definition of what is right,
`ondevice.testing` the suite that holds every backend to it.

Letters used for shapes: B rows, T new tokens, D width, H query heads, K key/value heads, d head size (keys and values
may differ), O and I outputs and inputs of a linear map, V vocabulary, E experts, k experts per token, N = tokens in a
flat list. Heads are [B, T, H, d] everywhere.

Arrays (`A`) are the backend's own type. Model code may use only `a + b`, `a * b` (arrays of one shape or broadcastable,
or a Python float on either side), `.shape`, `.reshape(*shape)` and the operations below. A weight (`W`) is what
`prepare` returned, dense or quantized: the model can't tell. Where an operation takes a W it also takes an array, which
is how trainable parameters enter.

Numerics: activations are float32 on the CPU and may be bfloat16 or float16 on a GPU; every sum accumulates in float32;
norms, rotary tables, softmax, router scores and losses are computed in float32. A backend created with `exact=True`
keeps activations, cache and products in float32 (no int8 activations, no TF32).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..errors import BadOption, ContextFull, Unsupported
from ..tensors import Tensor

A = Any  # the backend's array
W = Any  # what prepare() returned, or an array


# ------------------------------------------------------------------------------------------------ what is passed in


@dataclass(frozen=True)
class Step:
    """Where the tokens of one forward pass go. All fields are host int32 NumPy arrays.

    Row b holds `lengths[b]` real tokens, padded on the right to T, which take positions `starts[b]`,
    `starts[b] + 1`, … of sequence `slots[b]` of the cache. Padding is never written to the cache and never attended
    to; what comes out at padded places is unspecified but finite. `segments` [B, T], if given, numbers the documents
    packed in a row: attention never crosses them. `cache` is None when nothing is kept (training, scoring): then
    attention sees the row alone.
    """

    starts: np.ndarray
    lengths: np.ndarray
    slots: np.ndarray
    segments: np.ndarray | None = None
    cache: Cache | None = None

    @classmethod
    def whole(cls, rows: int, tokens: int, segments: np.ndarray | None = None) -> Step:
        """Full rows from position 0, without a cache."""
        zeros, full = np.zeros(rows, np.int32), np.full(rows, tokens, np.int32)
        return cls(zeros, full, np.arange(rows, dtype=np.int32), segments)


def positions(step: Step, tokens: int) -> np.ndarray:
    """See Backend.positions."""
    real = np.maximum(step.lengths[:, None] - 1, 0)
    return (step.starts[:, None] + np.minimum(np.arange(tokens, dtype=np.int32), real)).astype(np.int32)


def sharpness(step: Step, tokens: int, every: int, weight: float, ahead: int = 0) -> np.ndarray:
    """See Backend.sharpness."""
    past = np.floor((positions(step, tokens) + ahead) / every)[:, :, None]
    return (1 + weight * np.log1p(past)).astype(np.float32)


@dataclass(frozen=True)
class AttentionSpec:
    """How scores are made: softmax(softcap(scale * q.k) over the visible positions) . v

    window: position i sees j with 0 <= i - j < window (None: all of the past). chunk: i sees j only when
    i // chunk == j // chunk. softcap: scores become softcap * tanh(scores / softcap).
    """

    scale: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps per token: keys [K, key_dim] and values [K, value_dim]. window: tokens, itself among them,
    beyond which none sees back (a chunk's, where attention is within chunks); a cache need not keep more."""

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None


@dataclass(frozen=True)
class StateCache:
    """What a layer without attention keeps, however long the text: a short convolution's last inputs, `conv` =
    (taps - 1, channels), and a delta rule's `memory` = (H, dk, dv), float32; () where a layer has none."""

    conv: tuple[int, ...] = ()
    memory: tuple[int, ...] = ()


SCORINGS = ("softmax", "sigmoid", "sparsemixer")


@dataclass(frozen=True)
class RouteRule:
    """How a router's logits become experts and gates.

    scoring: softmax over all experts, sigmoid of each, or sparsemixer (Liu et al. 2024): experts are elected by their
    logits, and each one's gate is its share, under softmax, among the experts that are not elected before it and come
    near it, whose logit l is short of its own by no more than 2 jitter max(|l|, its own). groups/top_groups: only
    experts of the best groups (by the sum of each group's two best scores) stand for election. renormalise: the chosen
    gates are divided by their sum. scale: gates are multiplied by it. gate_on_input: the gate multiplies the expert's
    input instead of its output.
    """

    scoring: str = "softmax"
    groups: int = 1
    top_groups: int = 1
    renormalise: bool = True
    scale: float = 1.0
    gate_on_input: bool = False
    jitter: float = 0.01

    def __post_init__(self):
        if self.scoring not in SCORINGS:
            known = ", ".join(sorted(SCORINGS))
            raise Unsupported(f"There is no scoring named {self.scoring!r}.", f"Known: {known}.")


@dataclass(frozen=True)
class SamplingParams:
    """One row's way to choose a token. temperature 0 is greedy. Order: penalties, bias (in `mask`), temperature, top-k,
    top-p, min-p, then the draw. 0 (top_k, min_p) and 1 (top_p, repetition) switch a filter off.

    repetition divides positive and multiplies negative logits of every id seen in prompt or answer (CTRL, Keskar et
    al. 2019); presence and frequency subtract, for ids of the answer, once and per occurrence.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    top_logprobs: int = 0  # how many of the most likely next tokens to return


@dataclass(frozen=True)
class Sampled:
    """ids [B] int32 (an array of the backend, so that the next step may start before anyone reads it); `logprobs` [B]:
    of the chosen ids under softmax of the raw logits (before penalties and temperature), None unless some row asked
    for `top_logprobs`; `top`: (ids [B, n], logprobs [B, n]) of the most likely tokens, or None.
    """

    ids: A
    logprobs: A | None = None
    top: tuple[A, A] | None = None


@dataclass(frozen=True)
class Info:
    """What a backend says of itself. device: for people ("AVX2, 2 threads"). dtype: of its activations."""

    name: str
    device: str
    dtype: str
    exact: bool
    features: frozenset[str]
    details: dict[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------ what is given back


class Footprint(NamedTuple):
    """Bytes. held: memory of a weight's own. mapped: pages of its file that are read again and again, which the system
    may take back for a while."""

    held: int
    mapped: int = 0


class Routing(ABC):
    """Experts chosen for N tokens: `ids` [N, k] int32 in order of falling score, `gates` [N, k] float32. A backend
    adds what it needs (tokens sorted by expert, once)."""

    ids: A
    gates: A


def cache_dtype(name: str, features: Collection[str] = ()) -> str:
    """The name of a type that caches of a backend with these features hold, checked. Raises BadOption, and Unsupported
    for int8 where that is not among them."""
    if name == "int8" and "int8_cache" not in features:
        raise Unsupported("This backend has no cache in 8 bits.", "Choose 16 or 32 bits, or another backend.")
    if name not in ("float32", "float16", "bfloat16", "int8"):
        raise BadOption(f"A cache cannot hold {name!r}.", "Choose float32, float16, bfloat16 or int8.")
    return name


def keeps_float32(dtype: str | None) -> bool:
    """Whether `array` was asked for float32 whatever the activations are. Raises BadOption for another type."""
    if dtype not in (None, "float32"):
        raise BadOption(f"An array cannot be asked for in {dtype!r}.", "Give float32, or nothing.")
    return dtype is not None


class Cache(ABC):
    """Keys and values (or other state) of `slots` sequences of up to `capacity` tokens, for every layer.

    The engine moves `lengths`; operations only write at the places a Step names.
    """

    lengths: np.ndarray  # int32 [slots], on the host: tokens held, by slot
    capacity: int
    recurrent: bool = False  # some layer keeps a state, which knows no way back but to the beginning

    def advance(self, slots: np.ndarray, counts: np.ndarray) -> None:
        """After a forward pass: `counts[b]` more tokens are held in `slots[b]`."""
        for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
            self.lengths[slot] += count

    def truncate(self, slot: int, length: int) -> int:
        """Forget everything from position `length` on; returns the length really gone back to (<= length): a ring or
        a recurrent state may have to go back further, and the engine prefills from there."""
        if length < self.lengths[slot]:
            self.lengths[slot] = 0 if self.recurrent else length
        return int(self.lengths[slot])

    def reset(self, slot: int) -> None:
        self.truncate(slot, 0)

    def check(self, step: Step) -> None:
        """Whether the step's tokens have a place here. Raises ContextFull, BadOption for a slot that isn't there, and
        Unsupported for packed rows."""
        if step.segments is not None:
            raise Unsupported("Packed segments and a cache exclude each other.", "Give each document its own row.")
        for start, length, slot in zip(step.starts.tolist(), step.lengths.tolist(), step.slots.tolist(), strict=True):
            if start + length > self.capacity:
                raise ContextFull(
                    f"{start + length} tokens do not fit in a cache of {self.capacity}.",
                    "Shorten the prompt or raise the context.",
                )
            if not 0 <= slot < len(self.lengths) or start < 0:
                raise BadOption(f"A cache of {len(self.lengths)} slots has no place {start} of slot {slot}.")

    @abstractmethod
    def snapshot(self, slot: int) -> Any:
        """A copy of a slot's state, for `restore` on a cache of the same specs."""

    @abstractmethod
    def restore(self, slot: int, state: Any) -> None: ...

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes set aside."""

    def nbytes_of(self, capacity: int) -> int:
        """Bytes that a cache like this one, of layers that keep tokens, sets aside for another capacity: known without
        making it. Here: as many for each token."""
        return self.nbytes * capacity // self.capacity


# ------------------------------------------------------------------------------------------------ the operations

FEATURES = {
    "cache": "new_cache and attention over it",
    "int8_cache": "new_cache in int8",
    "experts": "route, expert_linear, combine",
    "latent": "latent_attention",
    "recurrent": "short_convolution, gated_delta",
    "training": "value_and_grad, remat, dropout, token_loss, adamw",
    "trainable_scales": "quantized: a weight differentiable in its scales and biases",
    "compile": "compile makes a real difference",
    "burst": "what compile returns can draw several tokens in a row",
}


class Backend(ABC):
    """One machine. A useful backend for dense inference implements the abstract methods; the rest has a composed
    default or belongs to a feature: a word in `features` that says what else it can do."""

    name: str
    features: frozenset[str] = frozenset()
    exact: bool = False
    asynchronous: bool = False  # results arrive later: the engine launches a step before it reads the one before

    # ---- life and transfer

    @abstractmethod
    def info(self) -> Info: ...

    @abstractmethod
    def prepare(self, tensor: Tensor) -> W:
        """A host tensor (any format of `ondevice.tensors`, any rank) made ready; one W serves `embed`, `linear`, norms
        and experts. The tensor may be a view of a file's memory map; it is not written to."""

    def footprint(self, tensor: Tensor) -> Footprint:
        """The memory that a weight made of this tensor takes while it is in use. Known without preparing it: the tensor
        may be a `tensors.blank`. Here: a copy as it is stored."""
        return Footprint(tensor.nbytes)

    def device_memory(self) -> int | None:
        """Bytes that weights and caches may take of the device's own memory; None: they live in the host's."""
        return None

    def release(self, weight: W) -> None:  # noqa: B027  (optional by design)
        """The weight will not be used again."""

    @abstractmethod
    def array(self, values: np.ndarray, dtype: str | None = None) -> A:
        """A host array: floats become the activations' dtype, integers int32. dtype "float32" keeps floats in at least
        float32, for what small steps must not be lost from: trainables. Such an array may stand where a W may; the
        product is made in the activations' dtype, the gradient comes back in float32."""

    @abstractmethod
    def numpy(self, a: A) -> np.ndarray:
        """To the host as float32 or int32. The only operation that must wait for results."""

    @abstractmethod
    def zeros(self, shape: Sequence[int]) -> A: ...

    def sync(self) -> None:  # noqa: B027
        """Wait until everything asked for has been computed."""

    @abstractmethod
    def dequantize(self, weight: W) -> A:
        """The weight's numbers as a float32 array of its logical shape."""

    # ---- forward

    @abstractmethod
    def embed(self, weight: W, ids: A) -> A:
        """weight [V, D], ids [B, T] int32 -> [B, T, D]"""

    @abstractmethod
    def linear(self, x: A, weight: W, bias: W | None = None) -> A:
        """x [..., I], weight [O, I], bias [O] -> x . weight^T + bias, [..., O]"""

    def adapted_linear(self, x: A, weight: W, bias: W | None, down: W, up: W, scale: float) -> A:
        """linear(x, weight, bias) + linear(linear(x, down) * scale, up): a LoRA adapter (Hu et al. 2021), down [r, I]
        and up [O, r]. Composed here; a backend may do it in one."""
        low = self.linear(x, down)
        return self.linear(x, weight, bias) + self.linear(low if scale == 1.0 else low * scale, up)

    @abstractmethod
    def rms_norm(self, x: A, gain: W | None, eps: float, offset: float = 0.0) -> A:
        """x [..., D] / sqrt(mean(x^2) + eps) * (gain [D] + offset); statistics in float32 (Zhang and Sennrich 2019).
        gain [H * D], for x [..., H, D]: of each head its own; None: there is none, nor an offset."""

    @abstractmethod
    def layer_norm(self, x: A, gain: W | None, bias: W | None, eps: float) -> A:
        """(x - mean) / sqrt(variance + eps) * gain + bias over the last axis (Ba et al. 2016). gain: see rms_norm."""

    @abstractmethod
    def rope(self, x: A, step: Step, freqs: np.ndarray, interleaved: bool = False, scale: float = 1.0) -> A:
        """Rotary positions (Su et al. 2021). x [B, T, H, d]; token t of row b has position p = starts[b] + t.

        freqs [r / 2] float32, on the host; angle of pair i: p * freqs[i]; the first r of d dimensions turn, the others
        pass. Pairs are (i, i + r/2), or (2i, 2i + 1) when interleaved. scale multiplies sine and cosine (yarn).
        """

    def positions(self, step: Step, tokens: int) -> A:
        """[B, tokens] int32: where each token of a step stands, starts[b] + t, for tables of learned positions; padding
        stands where its row's last real token does. Other than an array of the host's, it moves on in what `compile`
        returned."""
        return self.array(positions(step, tokens))

    def sharpness(self, step: Step, tokens: int, every: int, weight: float, ahead: int = 0) -> A:
        """[B, tokens, 1]: 1 + weight * log(1 + floor((p + ahead) / every)) of a token at position p, by which some
        models multiply queries, so that attention over long texts stays sharp (Nakanishi 2025). Moves on as `positions`
        do."""
        return self.array(sharpness(step, tokens, every, weight, ahead))

    @abstractmethod
    def attention(self, q: A, k: A, v: A, sinks: W | None, spec: AttentionSpec, step: Step, layer: int) -> A:
        """q [B, T, H, d], k [B, T, K, d], v [B, T, K, dv] -> [B, T, H, dv].

        With a cache: k and v of the real tokens are written at their positions in `layer` first, then each query sees
        the positions up to its own. Raises ContextFull, before it writes, when they don't fit. H is a multiple of K;
        query head h reads key head h // (H / K).
        sinks [H]: one more score in each softmax, with no value. spec: see AttentionSpec.
        """

    @abstractmethod
    def act(self, x: A, kind: str) -> A:
        """kind: silu, gelu (erf), gelu_tanh, relu, relu2 (squared), sigmoid, tanh, clamp (to -7 … 7), clamped_swish
        (x sigmoid(1.702 x) of x up to 7, beyond which it is flat); others raise Unsupported."""

    def gated(self, gate: A, up: A, kind: str) -> A:
        """act(gate) * up"""
        return self.act(gate, kind) * up

    @abstractmethod
    def softcap(self, x: A, cap: float) -> A:
        """cap * tanh(x / cap)"""

    @abstractmethod
    def take(self, x: A, rows: np.ndarray) -> A:
        """x [N, ...], rows: host int32 [M] -> [M, ...]"""

    @abstractmethod
    def split(self, x: A, sizes: Sequence[int]) -> tuple[A, ...]:
        """Cut the last axis in pieces of these sizes."""

    # ---- cache (feature "cache")

    def new_cache(
        self, specs: Sequence[LayerCache | StateCache], slots: int, capacity: int, dtype: str | None = None
    ) -> Cache:
        """Room for `slots` sequences of `capacity` tokens. dtype, of keys and values: float32, float16, bfloat16 or, as
        a feature, int8 (others raise BadOption); None: the backend's choice (float32 when exact). In int8 the numbers
        that a token has for one key head are whole ones up to 127 times a float32 scale of their own, the largest's
        size / 127, and so are those of its values. States are float32. A row of a Step that starts at position 0 starts
        from nothing, whatever its slot holds."""
        raise self._lacks("cache")

    # ---- experts (feature "experts")

    def route(self, logits: A, k: int, rule: RouteRule, bias: W | None = None) -> Routing:
        """logits [N, E] -> the k best experts of each token. bias [E] is added to the scores for the election only
        (DeepSeek-V3); equal scores elect the lower id."""
        raise self._lacks("experts")

    def expert_linear(self, x: A, weight: W, routing: Routing, bias: W | None = None) -> A:
        """weight [E, O, I], bias [E, O]; x [N, I] (each token to all its experts) or [N, k, I] -> [N, k, O]"""
        raise self._lacks("experts")

    def combine(self, y: A, routing: Routing) -> A:
        """y [N, k, D] -> sum over k of gates * y, [N, D] (without gates when the rule put them on the input)"""
        raise self._lacks("experts")

    # ---- latent attention (feature "latent")

    def latent_attention(
        self, q_nope: A, q_rope: A, c: A, k_rope: A, wk: W, wv: W, spec: AttentionSpec, step: Step, layer: int
    ) -> A:
        """Multi-head latent attention (DeepSeek-V2). q_nope [B, T, H, n], q_rope [B, T, H, r], c [B, T, L] the latent,
        k_rope [B, T, r]; wk [H, n, L], wv [H, dv, L] -> [B, T, H, dv]. The cache holds c and k_rope end to end:
        its layer is LayerCache(kv_heads=1, key_dim=L + r, value_dim=0)."""
        raise self._lacks("latent")

    # ---- mixers with a state (feature "recurrent"); the layer's cache is a StateCache

    def short_convolution(self, x: A, weight: W, bias: W | None, step: Step, layer: int) -> A:
        """Each channel a weighted sum of its last `taps` inputs: x [B, T, C], weight [C, taps], bias [C] -> [B, T, C];
        y_t = bias + sum over j of weight[:, j] * x_(t - taps + 1 + j), with zeros before the document's beginning."""
        raise self._lacks("recurrent")

    def gated_delta(self, q: A, k: A, v: A, a: A, b: A, rate: W, shift: W, step: Step, layer: int) -> A:
        """Gated delta rule (Yang et al. 2025). q and k [B, T, K, dk], v [B, T, H, dv], a and b [B, T, H], rate and
        shift [H] -> [B, T, H, dv]. q and k are made unit vectors (1e-6 under the root), q divided by sqrt(dk); head h
        reads key head h // (H / K). By token, with keep = exp(-exp(rate) * softplus(a + shift)) and learn = sigmoid(b):
        S = keep * S; S = S + learn * k (v - S^T k)^T; y = S^T q; S [dk, dv] is zero before the document begins."""
        raise self._lacks("recurrent")

    # ---- sampling

    @abstractmethod
    def sample(
        self,
        logits: A,
        params: Sequence[SamplingParams],
        u: np.ndarray,
        counts: tuple[np.ndarray, np.ndarray] | None = None,
        mask: np.ndarray | None = None,
    ) -> Sampled:
        """logits [B, V] -> one id a row. u [B] in [0, 1): the draw, from the host's counter-based generator, so that
        every backend sees the same noise; the id is the first, in vocabulary order, at which the running sum of the
        filtered probabilities exceeds u. counts: ids seen in the prompt and in the answer, two [B, V] int32; None when
        no row has a penalty. mask [B, V] float32 is added to the logits."""

    # ---- training (feature "training")

    def token_loss(self, logits: A, targets: A) -> A:
        """Cross-entropy, unreduced. logits [N, V]; targets [N] int32 (negative: no loss, 0) or a teacher's logits
        [N, V] (then the cross-entropy against its softmax) -> [N] float32"""
        raise self._lacks("training")

    def value_and_grad(self, fn: Callable) -> Callable:
        """fn(params, *arrays) -> (loss scalar, aux) becomes a function that returns ((loss, aux), grads). `params`
        (name -> array) comes first and is the only thing differentiated; grads has its names and shapes."""
        raise self._lacks("training")

    def remat(self, fn: Callable) -> Callable:
        """fn(params, *arrays) -> array, with nothing kept for the backward pass but its inputs (Chen et al. 2016)."""
        raise self._lacks("training")

    def dropout(self, x: A, rate: float, seed: int, step: int) -> A:
        """Zeroes a share of x and scales the rest; the pattern is a pure function of (seed, step, shape)."""
        raise self._lacks("training")

    def adamw(
        self,
        params: Mapping[str, A],
        grads: Mapping[str, A],
        state: dict,
        step: int,
        rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        decay: float = 0.0,
        bits: int = 32,
    ) -> tuple[dict[str, A], dict[str, A]]:
        """One AdamW update, bias-corrected, decoupled decay (Loshchilov and Hutter 2019), step counting from 1.
        state: {} at first. bits: of the moments kept from step to step: 32, or 8 for arrays of 4,096 numbers and more
        (`moments`). Returns new params and state: arrays by name, which come back from `array(numpy(a), "float32")` as
        they were."""
        raise self._lacks("training")

    def inverse_norm(self, weight: W, down: A, up: A, scale: float) -> A:
        """1 / norm of each row of weight + scale * up . down, [O], float32 whatever the activations are; a constant to
        gradients (DoRA, Liu et al. 2024, section 4.3)."""
        raise self._lacks("training")

    def sum(self, x: A) -> A:
        """The sum of all numbers of x: a scalar array."""
        raise self._lacks("training")

    def quantized(self, codes: np.ndarray, scales: A, biases: A, bits: int, group_size: int) -> W:
        """A weight that is differentiable in its scales and biases (feature "trainable_scales")."""
        raise self._lacks("trainable_scales")

    # ---- speed

    def compile(self, fn: Callable[[A, Step], A], state: Sequence[Any] = ()) -> Callable[[A, Step], A]:
        """A faster `fn(ids, step)`, called again and again with one shape and one cache; all that changes are the
        numbers in ids, starts, lengths and slots. `state`: the cache and weights that fn reads. What comes out is
        valid until the next call. Here: fn itself.

        With the feature "burst" and an fn of one row, [1, 1] -> logits [1, V], it also has `burst(ids, step, params, u,
        stop)`: what len(u) calls in a row draw, each with one of the numbers u, as `sample` does without counts and
        mask: int32 ids [n]. Each is the next call's input, one place further on; behind one of the ids `stop` there are
        no more calls. The engine moves the cache's length by n. None where this fn cannot be called so."""
        return fn

    def _lacks(self, feature: str) -> Unsupported:
        return Unsupported(
            f"The backend {self.name} cannot do this: it lacks {feature!r} ({FEATURES[feature]}).",
            "Use another backend: ondevice doctor lists those that are ready here.",
        )
