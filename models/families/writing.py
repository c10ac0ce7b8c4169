"""How one of our tensors goes into a file of its family: under which name, laid out how, experts one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial

from ...checkpoint import Spec
from ...schemes import row
from ...tensors import Affine, Blocks, Dense, Tensor
from . import NameMap
from .views import stored, stored_shape


def specs(
    names: NameMap, name: str, shape: Sequence[int], form: Dense | Affine | Blocks, load: Callable[[], Tensor]
) -> Iterator[Spec]:
    """What is written of `name`, which has `shape` and will be of `form`; load makes it, once for a stack of experts.
    Raises Unsupported where it lies within another tensor only."""
    spelled, views = names.written(name, not isinstance(form, Dense))
    if "{e}" not in spelled:
        yield Spec(spelled, stored_shape(shape, views), form, lambda: stored(load(), views))
    else:
        once = lru_cache(maxsize=1)(load)
        for e in range(shape[0]):
            yield Spec(spelled.replace("{e}", str(e)), tuple(shape[1:]), form, partial(_one, once, e))


def _one(load: Callable[[], Tensor], expert: int) -> Tensor:
    return row(load(), expert)
