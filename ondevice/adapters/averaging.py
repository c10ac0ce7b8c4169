"""Several adapters into one: what a server does in federated learning with what each device has learned at home."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..errors import BadOption
from ..schemes import to_float
from ..tensors import Tensor, dense
from .adapter import Adapter, LowRank

Shares = Sequence[tuple[Adapter, float]]  # an adapter and how much it counts, by whatever measure


def averaged(shares: Shares) -> Adapter:
    """The mean of all their numbers, weighted: federated averaging (McMahan et al. 2017) of LoRA's factors. They must
    change the same weights at the same ranks and scales; a common beginning (`lora-train --init`) is what makes the
    mean of factors mean something. Raises BadOption, naming every difference."""
    adapters, weights = _checked(shares)
    first = adapters[0]
    _require_alike(adapters)

    def mean(pick: Callable[[Adapter], Tensor]) -> Tensor:
        values = sum(w * to_float(pick(a)).astype(np.float64) for a, w in zip(adapters, weights, strict=True))
        return dense(np.asarray(values, np.float32))

    updates = {
        name: LowRank(
            mean(lambda a, n=name: a.updates[n].down),
            mean(lambda a, n=name: a.updates[n].up),
            update.scale,
            None if update.magnitude is None else mean(lambda a, n=name: a.updates[n].magnitude),
        )
        for name, update in first.updates.items()
    }
    replaced = {name: mean(lambda a, n=name: a.replaced[n]) for name in first.replaced}
    return replace(first, updates=updates, replaced=replaced)


def stacked(shares: Shares) -> Adapter:
    """The mean of their changes, exactly: factors end to end, so that ranks add up (Wang et al. 2024). Ranks and
    targets may differ. Raises BadOption for DoRA and for whole tensors, whose changes don't add up so."""
    adapters, weights = _checked(shares)
    if any(a.dora or a.replaced for a in adapters):
        raise BadOption("Adapters with magnitudes (DoRA) or whole tensors cannot be stacked.", "Leave out --exact.")
    names = dict.fromkeys(name for a in adapters for name in a.updates)
    parts = {
        name: [(a.updates[name], w) for a, w in zip(adapters, weights, strict=True) if name in a.updates]
        for name in names
    }
    return replace(adapters[0], updates={n: _end_to_end(n, p) for n, p in parts.items()}, rslora=False)


def _end_to_end(name: str, parts: Sequence[tuple[LowRank, float]]) -> LowRank:
    """One scale for all: that of the first; the others' differences go into `up`."""
    scale, axis = parts[0][0].scale, -1 if name == "embed" else -2
    downs = [to_float(update.down) for update, _ in parts]
    ups = [to_float(update.up) * np.float32(weight * update.scale / scale) for update, weight in parts]
    return LowRank(dense(np.concatenate(downs, axis)), dense(np.concatenate(ups, -1)), scale)


def _checked(shares: Shares) -> tuple[list[Adapter], list[float]]:
    """Adapters, and weights that sum to 1."""
    if len(shares) < 2:
        raise BadOption("One adapter alone has no mean.", "Give two or more.")
    for adapter, _ in shares:
        adapter.require_weights("averaged")
    total = sum(weight for _, weight in shares)
    if total <= 0 or any(weight < 0 for _, weight in shares):
        raise BadOption("Weights must be positive.", "Give how much each counts, such as its number of examples.")
    return [adapter for adapter, _ in shares], [weight / total for _, weight in shares]


def _require_alike(adapters: Sequence[Adapter]) -> None:
    first, faults = _facts(adapters[0]), []
    for number, adapter in enumerate(adapters[1:], 2):
        facts = _facts(adapter)
        for name in dict.fromkeys([*first, *facts]):
            if first.get(name) != facts.get(name):
                faults.append(
                    f"{name}: {first.get(name, 'nothing')} in the first, {facts.get(name, 'nothing')} in no. {number}"
                )
    if faults:
        more = f" and {len(faults) - 6} more" if len(faults) > 6 else ""
        raise BadOption(
            f"The adapters differ: {'; '.join(faults[:6])}{more}.",
            "Train them with the same options, or use --exact, which takes different ranks and targets.",
        )


def _facts(adapter: Adapter) -> Mapping[str, str]:
    """What must be the same, in words."""
    dora = {name: " with magnitudes" if u.magnitude is not None else "" for name, u in adapter.updates.items()}
    ranks = {n: f"rank {u.rank}, scale {u.scale:g}{dora[n]}" for n, u in adapter.updates.items()}
    return ranks | {name: f"whole, {list(tensor.shape)}" for name, tensor in adapter.replaced.items()}
