"""How our tensors go into the files of their family: under which names, laid out how, several in one, experts apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from ...checkpoint import Spec
from ...errors import Unsupported
from ...schemes import row, to_dense
from ...tensors import STORAGE, Affine, Blocks, Dense, Tensor
from ..config import Mixer, ModelConfig
from . import NameMap
from .views import ROWS, stored, stored_shape

Format = Dense | Affine | Blocks
WHOLE = ({"first", "last"}, {"even", "odd"})  # the parts of a stored tensor that make it up


@dataclass(frozen=True)
class Piece:
    """One of our parameters on its way into a file: what it will be, and how to get it when its turn comes. expert: how
    to get one of a stack, where that is less work than to get all."""

    name: str
    shape: tuple[int, ...]
    form: Format
    load: Callable[[], Tensor]
    expert: Callable[[int], Tensor] | None = None


def specs(names: NameMap, config: ModelConfig, pieces: Iterable[Piece]) -> Iterator[Spec]:
    """What is written of `pieces`, all that a folder of `config` will hold: in transformers' names where all of it is
    dense, else in mlx-lm's. Each Spec is `of` the parameters that it holds. Raises Unsupported for a part of a tensor
    whose other part is not among them."""
    pieces = list(pieces)
    mlx = any(not isinstance(piece.form, Dense) for piece in pieces)
    within: dict[str, list[tuple[Piece, tuple[str, ...]]]] = {}
    for piece in pieces:
        spelled, views = names.written(piece.name, mlx)
        within.setdefault(spelled, []).append((piece, views))
    for spelled, held in within.items():
        mixer = _mixer(held[0][0].name, config)
        if "{e}" in spelled:
            yield from _apart(spelled, *held[0])
        elif "{h}" in spelled:
            yield from _by_head(spelled, held[0][0], mixer.head_dim)
        else:
            yield _together(spelled, [piece for piece, _ in held], [views for _, views in held], mixer)


def _mixer(name: str, config: ModelConfig) -> Mixer | None:
    return config.layers[int(name.split(".")[1])].mixer if name.startswith("layers.") else None


def _by_head(spelled: str, piece: Piece, size: int) -> Iterator[Spec]:
    """Gains of heads, one a tensor."""
    load = lru_cache(maxsize=1)(piece.load)
    for head, start in enumerate(range(0, piece.shape[0], size)):
        part = partial(_cut, load, slice(start, start + size))
        yield Spec(spelled.replace("{h}", str(head)), (size,), piece.form, part, (piece.name,))


def _cut(load: Callable[[], Tensor], numbers: slice) -> Tensor:
    part = load().parts["weight"][numbers]
    return Tensor(part.shape, load().format, {"weight": part})


def _apart(spelled: str, piece: Piece, views: Sequence[str]) -> Iterator[Spec]:
    """Experts, one a tensor."""
    load = piece.expert or partial(_one, lru_cache(maxsize=1)(piece.load))
    for e in range(piece.shape[0]):
        yield Spec(spelled.replace("{e}", str(e)), piece.shape[1:], piece.form, partial(load, e), (piece.name,))


def _one(load: Callable[[], Tensor], expert: int) -> Tensor:
    return row(load(), expert)


def _together(spelled: str, pieces: Sequence[Piece], views: Sequence[Sequence[str]], mixer: Mixer | None) -> Spec:
    """One tensor, or several in one."""
    parts = {view for some in views for view in some if view in ROWS}
    if (len(pieces) > 1 or parts) and (parts not in WHOLE or len(pieces) != len(parts)):
        raise Unsupported(f"{spelled} holds more than {pieces[0].name}.", "Use the model as it is.")
    bias = pieces[0].name.endswith(".bias")
    form, shape = _common(pieces), stored_shape([piece.shape for piece in pieces], views, bias, mixer)
    return Spec(
        spelled, shape, form, partial(_load, pieces, views, form, bias, mixer), tuple(piece.name for piece in pieces)
    )


def _common(pieces: Sequence[Piece]) -> Format:
    """The format of several in one: dense where they differ, in the widest type that one of them has."""
    first, *others = (piece.form for piece in pieces)
    plain = [form for form in (first, *others) if isinstance(form, Dense)]
    if all(form == first for form in others):
        return first
    return max(plain, key=lambda form: STORAGE[form.dtype].itemsize) if plain else Dense("bfloat16")


def _load(
    pieces: Sequence[Piece], views: Sequence[Sequence[str]], form: Format, bias: bool, mixer: Mixer | None
) -> Tensor:
    tensors = [piece.load() for piece in pieces]
    if isinstance(form, Dense) and len(pieces) > 1:
        tensors = [to_dense(tensor, form.dtype) for tensor in tensors]
    return stored(tensors, views, bias, mixer)
