"""Every tensor of the fused model, worked out when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from ...adapters import Adapter, merged, replaced
from ...checkpoint import Spec
from ...errors import Unsupported
from ...models.config import ModelConfig
from ...models.decoder import Decoder
from ...models.families import NameMap
from ...models.families.writing import Piece, specs
from ...models.parameters import Parameters
from ...schemes import LEGACY_BITS, label, to_affine, to_dense
from ...tensors import Affine, Blocks, Dense, Tensor, dense
from .feedback import Inputs
from .rounding import bits_of, rounded

Format = Dense | Affine
Weighted = tuple[Adapter, float]


class Weights:
    """The parameters of a model with its adapters worked in, by our names.

    touched: what an adapter changes. inputs: what flows into those, once observed. tied: whether the head still is the
    embedding. formats: what each becomes; by default what it was, and GGUF's affine types MLX's.
    """

    def __init__(self, base: Parameters, config: ModelConfig, adapters: Sequence[Weighted]):
        self.base, self.config, self.adapters = base, config, list(adapters)
        self.checkpoint = base.checkpoint
        for adapter, _ in adapters:
            adapter.require_weights("fused")
        changed = [name for adapter, _ in adapters for name in (*adapter.updates, *adapter.replaced)]
        self.touched = dict.fromkeys(changed)
        self.inputs: Inputs | None = None
        self._made: dict[str, Tensor] = {}
        self.tied = config.tied and not self._parted()
        self.shapes = dict(base.shapes)
        if config.tied and not self.tied:
            self.shapes["head"] = self.shapes["embed"]
        if self.tied:
            self.touched.pop("head", None)
        self.formats: dict[str, Format | Blocks] = {name: _kept(self._own(name)) for name in self.shapes}

    def _parted(self) -> bool:
        """Whether embedding and head, one before, become two: they remain one if both change alike."""
        if not {"embed", "head"} & set(self.touched):
            return False
        if {"embed", "head"} <= set(self.touched):
            return not np.array_equal(self._values("embed"), self._values("head"))
        return True

    def _own(self, name: str) -> Tensor:
        return self.base["embed" if name == "head" and self.config.tied else name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        """What was rounded is kept, as long as its format stays: rounding takes time."""
        form = self.formats[name]
        if name in self._made and self._made[name].format == form:
            return self._made[name]
        made = self._make(name)
        if name in self.touched and isinstance(form, Affine):
            self._made[name] = made
        return made

    def _make(self, name: str) -> Tensor:
        own, form = self._own(name), self.formats[name]
        if isinstance(form, Dense):
            return to_dense(dense(self._values(name)) if name in self.touched else own, form.dtype)
        if name in self.touched or not _stands(own.format):
            return rounded(own, self._values(name), form, self.inputs.factors(name) if self.inputs else None)
        return to_affine(own) if isinstance(own.format, Blocks) else own

    def _values(self, name: str) -> np.ndarray:
        whole = replaced(self._own, [(a, w) for a, w in self.adapters if name in a.replaced]).get(name)
        updates = [(a.updates[name], w) for a, w in self.adapters if name in a.updates]
        return merged(whole or self._own(name), updates, name == "embed")

    def stored(self, name: str) -> list[str]:
        return self.base.stored("embed" if name == "head" and self.config.tied else name)

    def observe(self, decoder: Decoder, ids: np.ndarray) -> None:
        """See what flows into the touched matrices that will be rounded; from now on that tells how."""
        names = [name for name in self.touched if self._own(name).quantized and len(self.shapes[name]) == 2]
        self.inputs = Inputs(decoder, names, ids) if names else None

    # ---- choices of format

    def make_dense(self, dtype: str) -> None:
        self.formats = {name: Dense(dtype) for name in self.shapes}

    def set_bits(self, bits: int | None, group_size: int | None, least: int = 0) -> None:
        """Of the touched tensors that are quantized: `bits`, or what they had and at least `least`. Raises Unsupported
        where the base's own format has no place in a folder and no bits are given."""
        for name in self.shapes:
            own = self._own(name)
            if not own.quantized:
                continue
            known = _stands(own.format)
            if bits is None and not known:
                raise Unsupported(
                    f"{self.checkpoint.path} stores {self.stored(name)[0]} as {label(own.format)}, "
                    "which a Hugging Face folder has no place for.",
                    "Choose what it becomes: --bits 4 (or 5, 6, 8), or --dtype bfloat16.",
                )
            if name in self.touched or not known:
                self.formats[name] = _affine(own, bits or max(bits_of(own), least), group_size)

    @property
    def bits(self) -> set[int]:
        """Of the touched tensors that are quantized."""
        return {form.bits for name in self.touched if isinstance(form := self.formats[name], Affine)}

    # ---- writing

    def specs(self, names: NameMap) -> Iterator[Spec]:
        """What is written, as this family's files name it."""
        forms = self.formats.items()
        return specs(
            names, self.config, (Piece(n, self.shapes[n], form, partial(self.__getitem__, n)) for n, form in forms)
        )


def _stands(form: Format | Blocks) -> bool:
    """Whether a folder can hold it, code by code."""
    return not isinstance(form, Blocks) or form.kind in LEGACY_BITS


def _kept(tensor: Tensor) -> Format | Blocks:
    form = tensor.format
    return (
        Affine(LEGACY_BITS[form.kind], 32, "float16") if isinstance(form, Blocks) and form.kind in LEGACY_BITS else form
    )


def _affine(tensor: Tensor, bits: int, group_size: int | None) -> Affine:
    form = _kept(tensor)
    if isinstance(form, Blocks):
        form = Affine(bits, 32, "float16")
    return replace(form, bits=bits, group_size=group_size or form.group_size)
