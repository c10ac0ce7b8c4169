"""How a model changes: which arrays are trained, where they begin, and how the forward pass sees them.

A method knows nothing of losses or loops. Its parameters are named after the weights they belong to
("layers.3.attn.q.lora_down"), so that each layer's can be told from the others'.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from .. import noise
from ..backends.base import A
from ..errors import BadOption
from ..models.decoder import Decoder
from ..models.scope import Lora, Scope
from ..runtime.session import Session
from ..tensors import Affine, Tensor, floats, store
from .batches import Batch
from .settings import Settings
from .targets import Target, find_targets, find_whole

Params = Mapping[str, A]


class Method(ABC):
    """What is trained of a decoder. `moment` numbers forward passes, so that dropout never repeats itself; None: no
    dropout."""

    decoder: Decoder

    @abstractmethod
    def initial(self) -> dict[str, np.ndarray]:
        """Where the parameters begin, float32: the same on every backend."""

    @abstractmethod
    def scope(self, params: Params, moment: int | None) -> Scope:
        """The model's weights with the trained ones in their places. params: all of them, or one layer's."""

    def embed(self, params: Params, batch: Batch, moment: int | None) -> A:
        """What the first layer gets, [B, T, D]."""
        return self.decoder.embed(self.scope(params, moment), self.decoder.ops.array(batch.ids), batch.step)


class LowRank(Method):
    """LoRA (Hu et al. 2021), rank-stabilised LoRA (Kalajdzievski 2023: alpha / sqrt(rank)) and DoRA (Liu et al. 2024).
    The factors begin as in peft: `down` uniform within sqrt(1 / inputs), `up` zero, so that the model starts unchanged.
    whole: weights that are trained themselves, in float32 (an embedding that is the head as well in both its places).
    """

    def __init__(self, session: Session, targets: Sequence[Target], settings: Settings, whole: Sequence[str] = ()):
        self.decoder, self.settings, self.whole = session.decoder, settings, tuple(whole)
        self.targets = {t.name: t for t in targets}
        self._check_whole()
        if settings.method == "dora":
            self._check_dora()
        self.biases = {name: self._bias(name) for name in self.targets} if settings.method == "dora" else {}

    def _check_whole(self) -> None:
        reached = {*self.whole, "head"} if "embed" in self.whole and self.decoder.config.tied else {*self.whole}
        both = [t.module for t in self.targets.values() if t.name in reached]
        if both:
            raise BadOption(f"{both[0]} cannot be adapted and trained whole.", "Leave out one of the two.")

    def _check_dora(self) -> None:
        odd = [t.module for t in self.targets.values() if len(t.shape) != 2 or t.name == "embed"]
        if odd:
            raise BadOption(f"DoRA cannot adapt {odd[0]}: neither embeddings nor experts.", "Use lora for these.")

    def _bias(self, name: str) -> A | None:
        ops, bias = self.decoder.ops, self.decoder.weights.get(f"{name}.bias")
        return None if bias is None else ops.array(ops.numpy(ops.dequantize(bias)))

    def scale(self, target: Target) -> float:
        return target.alpha / (target.rank**0.5 if self.settings.method == "rslora" else target.rank)

    def initial(self) -> dict[str, np.ndarray]:
        made = {name: self._values(name) for name in self.whole}
        for name, t in self.targets.items():
            draw = noise.generator(self.settings.seed, f"{name}.lora_down")
            *experts, outputs, inputs = t.shape
            if name == "embed":  # looked up by rows: here the side of the ids begins at zero
                made[f"{name}.lora_down"] = np.zeros((outputs, t.rank), np.float32)
                made[f"{name}.lora_up"] = draw.standard_normal((inputs, t.rank), np.float32)
                continue
            bound = np.float32(inputs**-0.5)
            uniform = draw.random((*experts, t.rank, inputs), np.float32)
            made[f"{name}.lora_down"] = (2 * uniform - 1) * bound
            made[f"{name}.lora_up"] = np.zeros((*experts, outputs, t.rank), np.float32)
            if self.settings.method == "dora":
                made[f"{name}.magnitude"] = self._norms(name)
        return made

    def _norms(self, name: str) -> np.ndarray:
        tied = name == "head" and self.decoder.config.tied
        return np.linalg.norm(self._values("embed" if tied else name), axis=-1)

    def _values(self, name: str) -> np.ndarray:
        ops = self.decoder.ops
        return np.array(ops.numpy(ops.dequantize(self.decoder.weights[name])), np.float32)

    def scope(self, params: Params, moment: int | None) -> Scope:
        names = [key.removesuffix(".lora_down") for key in params if key.endswith(".lora_down")]
        own = {name: params[name] for name in self.whole if name in params}
        return self.decoder.scope(own, loras={name: (self._lora(name, params, moment),) for name in names})

    def _lora(self, name: str, params: Params, moment: int | None) -> Lora:
        ops, scale = self.decoder.ops, self.scale(self.targets[name])
        down, up, magnitude = (params.get(f"{name}.{part}") for part in ("lora_down", "lora_up", "magnitude"))
        drop = None
        if moment is not None and self.settings.dropout:
            seed = self.settings.seed ^ zlib.crc32(name.encode())
            drop = partial(ops.dropout, rate=self.settings.dropout, seed=seed, step=moment)
        return Lora(down, up, scale, magnitude, self.biases.get(name), dropout=drop)


class Full(Method):
    """Every weight is trained, in float32, in the place of the model's own."""

    def __init__(self, session: Session):
        self.decoder = session.decoder

    def initial(self) -> dict[str, np.ndarray]:
        ops = self.decoder.ops
        return {name: ops.numpy(ops.dequantize(weight)) for name, weight in self.decoder.weights.items()}

    def scope(self, params: Params, moment: int | None) -> Scope:
        return self.decoder.scope(params, loras={})


class Prompt(Method):
    """Prompt tuning (Lester et al. 2021): the embeddings of some tokens in front of every sequence. They begin as the
    embeddings of tokens of the model's own, drawn by the seed."""

    NAME = "prompt"

    def __init__(self, session: Session, settings: Settings):
        self.decoder, self.settings = session.decoder, settings

    def initial(self) -> dict[str, np.ndarray]:
        ops, config = self.decoder.ops, self.decoder.config
        draw = noise.generator(self.settings.seed, "virtual tokens")
        ids = draw.integers(0, config.vocab, self.settings.virtual_tokens).astype(np.int32)
        found = ops.numpy(self.decoder.look_up(self.decoder.scope(loras={}), ops.array(ids[None])))
        return {self.NAME: found[0].astype(np.float32)}

    def scope(self, params: Params, moment: int | None) -> Scope:
        return self.decoder.scope(loras={})

    def embed(self, params: Params, batch: Batch, moment: int | None) -> A:
        """Real places get the model's embedding, those of virtual tokens (id -1 - number) the trained one: each is
        looked up everywhere and struck out where it does not belong, as no operation joins arrays."""
        ops, p = self.decoder.ops, self.scope(params, moment)
        virtual = (batch.ids < 0)[..., None].astype(np.float32)
        own = self.decoder.look_up(p, ops.array(np.maximum(batch.ids, 0)))
        trained = ops.embed(params[self.NAME], ops.array(np.maximum(-1 - batch.ids, 0)))
        return self.decoder.enter(p, own * ops.array(1 - virtual) + trained * ops.array(virtual), batch.step)


class Scales(Method):
    """The scales and biases of quantized weights (MLX's affine kind), codes untouched; embeddings, heads and experts
    included. For each group two numbers are trained that begin at zero, in steps of the group's own scale: `stretch`
    moves codes away from their middle, `shift` moves all of them, so that the two hardly pull at each other."""

    PARTS = ("stretch", "shift")

    def __init__(self, session: Session):
        self.decoder = session.decoder
        found = {name: session.parameters[name] for name in session.parameters}
        self.tensors = {name: tensor for name, tensor in found.items() if isinstance(tensor.format, Affine)}
        if not self.tensors:
            raise BadOption("There are no scales to train: nothing here is quantized so.", "Quantize it first.")

    def initial(self) -> dict[str, np.ndarray]:
        shapes = {name: tensor.parts["scales"].shape for name, tensor in self.tensors.items()}
        return {f"{name}.{part}": np.zeros(shape, np.float32) for name, shape in shapes.items() for part in self.PARTS}

    def scope(self, params: Params, moment: int | None) -> Scope:
        named = [key.removesuffix(".stretch") for key in params if key.endswith(".stretch")]
        return self.decoder.scope({name: self._weight(name, params) for name in named}, loras={})

    def _weight(self, name: str, params: Params) -> A:
        ops, form = self.decoder.ops, self.tensors[name].format
        scales, biases = (ops.array(values, "float32") for values in self._own(name))
        stretch, shift = (params[f"{name}.{part}"] for part in self.PARTS)
        moved = biases + scales * shift + scales * stretch * -_middle(form)
        codes = self.tensors[name].parts["weight"]
        return ops.quantized(codes, scales + scales * stretch, moved, form.bits, form.group_size)

    def _own(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        parts, dtype = self.tensors[name].parts, self.tensors[name].format.dtype
        return floats(parts["scales"], dtype), floats(parts["biases"], dtype)

    def trained(self, name: str, params: Mapping[str, np.ndarray]) -> Tensor:
        """The weight with what was learnt: the codes that it had."""
        tensor = self.tensors[name]
        scales, biases = self._own(name)
        stretch, shift = (params[f"{name}.{part}"] for part in self.PARTS)
        moved = biases + scales * (shift - stretch * np.float32(_middle(tensor.format)))
        made = {"scales": scales * (1 + stretch), "biases": moved}
        kept = {part: store(values, tensor.format.dtype) for part, values in made.items()}
        return Tensor(tensor.shape, tensor.format, {"weight": tensor.parts["weight"], **kept})


def _middle(form: Affine) -> float:
    return ((1 << form.bits) - 1) / 2


def make_method(session: Session, settings: Settings) -> Method:
    """Raises BadOption where the settings fit nothing in this model."""
    if settings.method == "full":
        return Full(session)
    if settings.method == "prompt":
        return Prompt(session, settings)
    if settings.method == "scales":
        return Scales(session)
    targets = find_targets(session.family, session.config, settings)
    return LowRank(session, targets, settings, find_whole(session.family, session.config, settings))
