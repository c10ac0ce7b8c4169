"""Updates of what transformers holds in one module or parameter and we hold as several weights (gate and up, keys and
values), or as one that lies otherwise: taken apart and put together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import Unsupported
from ..models.families.views import stored, viewed
from ..schemes import to_float
from ..tensors import Tensor, store
from .adapter import LowRank
from .files import tensor
from .modules import Modules, Piece

Parts = dict[str, Tensor]


def apart(parts: Mapping[str, Tensor], scale: float, pieces: Sequence[Piece], modules: Modules) -> dict[str, LowRank]:
    """The update of a module -> those of our weights in it. parts: down [r, I] and up [O, r], of stacks [E, r, I] and
    [E, O, r], and magnitude [O]."""
    if len(pieces) == 1 and not _rows(pieces[0]):
        return {pieces[0].name: LowRank(parts["down"], parts["up"], scale, parts.get("magnitude"))}
    updates, (down, up, magnitude) = {}, (parts.get(part) for part in ("down", "up", "magnitude"))
    for piece in pieces:
        shape, views = modules.shapes[piece.name], _rows(piece)
        part = down.parts["weight"]
        updates[piece.name] = LowRank(
            tensor(np.broadcast_to(part, (*shape[:-2], *part.shape[-2:])), down.format.dtype),
            viewed(up, views, (*shape[:-1], up.shape[-1]), bias=False),
            scale,
            magnitude and viewed(magnitude, views, shape[:-1], bias=True),
        )
    return _unblocked(updates)


def together(updates: Sequence[LowRank | None], pieces: Sequence[Piece], modules: Modules) -> LowRank:
    """The update of a module from those of our weights in it (None: zeros). Raises Unsupported where a module's form
    has no place for them."""
    if len(pieces) == 1 and not _rows(pieces[0]):
        return updates[0]
    known = next(update for update in updates if update is not None)
    downs = [_once(u, piece, modules) for u, piece in zip(updates, pieces, strict=True) if u is not None]
    ups = [_at_scale(u, modules.shapes[piece.name], known) for u, piece in zip(updates, pieces, strict=True)]
    if all(np.array_equal(down, downs[0]) for down in downs):  # as one module's update, come apart, still is
        down = downs[0]
    else:
        down, ups = _blocks(downs, ups)
    views, types = [_rows(piece) for piece in pieces], [t.format.dtype for t in (known.down, known.up)]
    up = stored([tensor(np.ascontiguousarray(up), types[1]) for up in ups], views, bias=False)
    return LowRank(tensor(down, types[0]), up, known.scale, _magnitude(updates, pieces, views))


def _rows(piece: Piece) -> tuple[str, ...]:
    """How its rows lie: an update has its outputs in front whether the weight is turned or not."""
    return tuple(view for view in piece.views if view not in ("T", "swapped"))


def _once(update: LowRank, piece: Piece, modules: Modules) -> np.ndarray:
    """`down` as a module has it: once, where each head of ours has it."""
    down = update.down.parts["weight"]
    if "heads" not in piece.views:
        return down
    if not (down == down[:1]).all():
        raise Unsupported(
            f"{modules.homes[piece.name]} is one module in PEFT's format: it has no place for heads' own updates.",
            "Adapt other weights.",
        )
    return down[0]


def _at_scale(update: LowRank | None, shape: Sequence[int], like: LowRank) -> np.ndarray:
    """`up` as `like` stores it, such that its scale holds for it; zeros where there is no update."""
    if update is None:
        return np.zeros((*shape[:-1], like.rank), like.up.parts["weight"].dtype)
    if update.scale == like.scale:
        return update.up.parts["weight"]
    return store(to_float(update.up) * np.float32(update.scale / like.scale), like.up.format.dtype)


def _magnitude(
    updates: Sequence[LowRank | None], pieces: Sequence[Piece], views: Sequence[Sequence[str]]
) -> Tensor | None:
    found = [None if update is None else update.magnitude for update in updates]
    if not any(found):
        return None
    if not all(found):
        names = " and ".join(piece.name for piece in pieces)
        raise Unsupported(f"{names} are one module in PEFT's format: DoRA is on both or on none.", "Adapt both.")
    return stored([tensor(np.ascontiguousarray(m.parts["weight"]), m.format.dtype) for m in found], views, bias=True)


def _blocks(downs: list[np.ndarray], ups: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Two updates side by side in rank, each reaching only its own outputs."""
    ranks, still = [up.shape[-1] for up in ups], [(0, 0)] * (ups[0].ndim - 1)
    padded = [np.pad(ups[0], [*still, (0, ranks[1])]), np.pad(ups[1], [*still, (ranks[0], 0)])]
    return np.concatenate(downs, -2), padded


def _unblocked(updates: dict[str, LowRank]) -> dict[str, LowRank]:
    """The inverse of `_blocks`, where the pattern is there and something is in it."""
    first, second = (update.up.parts["weight"] for update in updates.values())
    half, odd = divmod(first.shape[-1], 2)
    blocked = not odd and not first[..., half:].any() and not second[..., :half].any()
    if not blocked or not first.any() or not second.any():
        return updates
    halves = (slice(None, half), slice(half, None))
    return {name: _within(update, cut) for (name, update), cut in zip(updates.items(), halves, strict=True)}


def _within(update: LowRank, ranks: slice) -> LowRank:
    down, up = update.down.parts["weight"][..., ranks, :], update.up.parts["weight"][..., ranks]
    types = update.down.format.dtype, update.up.format.dtype
    return LowRank(tensor(down, types[0]), tensor(up, types[1]), update.scale, update.magnitude)
