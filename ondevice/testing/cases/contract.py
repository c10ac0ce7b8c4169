"""What a backend is, before anything is computed: its signatures, its words, its arrays."""

from __future__ import annotations

import inspect

import numpy as np

from ...backends.base import FEATURES, Backend, Info
from ...errors import Unsupported
from ...tensors import Affine, Dense, blank, dense
from ..suite import Pair, case, equal, int32


@case()
def signatures(pair: Pair) -> None:
    """Every method takes what the contract says, under the same names and with the same defaults."""
    kind = type(pair.backend)
    for name, method in inspect.getmembers(Backend, inspect.isfunction):
        if name.startswith("_"):
            continue
        want, got = (
            [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
            for f in (method, getattr(kind, name))
        )
        assert got[: len(want)] == want, f"{name}{inspect.signature(getattr(kind, name))} should be {name}{want}"
        extra = [p for p in got[len(want) :] if p[2] is inspect.Parameter.empty]
        assert not extra, f"{name} asks for more than the contract gives: {extra}"


@case()
def information(pair: Pair) -> None:
    info = pair.backend.info()
    assert isinstance(info, Info), f"info() returned {type(info).__name__}"
    assert info.name == pair.backend.name, f"info() speaks of {info.name!r}, the backend is {pair.backend.name!r}"
    assert info.dtype in ("float64", "float32", "float16", "bfloat16"), f"activations in {info.dtype!r}?"
    equal("info().exact", info.exact, pair.backend.exact)
    equal("info().features", info.features, pair.backend.features)
    unknown = pair.backend.features - set(FEATURES)
    assert not unknown, f"unknown features: {sorted(unknown)}"


@case()
def features_said_and_unsaid(pair: Pair) -> None:
    """What is not declared raises Unsupported, so that a program can say so."""
    x = pair.backend.zeros((2, 4))
    calls = {
        "training": lambda: pair.backend.sum(x),
        "latent": lambda: pair.backend.latent_attention(x, x, x, x, x, x, None, None, 0),
        "experts": lambda: pair.backend.combine(x, None),
        "cache": lambda: pair.backend.new_cache([], 1, 1),
        "int8_cache": lambda: pair.backend.new_cache([], 1, 1, "int8"),
    }
    for feature, call in calls.items():
        if feature in pair.backend.features:
            continue
        try:
            call()
        except Unsupported:
            continue
        raise AssertionError(f"{feature!r} is not declared, yet its operations answer")


@case(shape=[(3,), (2, 1, 5), (0, 4)])
def there_and_back(pair: Pair, shape: tuple[int, ...]) -> None:
    for values in (pair.normal(*shape), pair.ids(1000, *shape)):
        a = pair.backend.array(values)
        equal("shape", tuple(a.shape), shape)
        back = pair.backend.numpy(a)
        expected = values.dtype if values.dtype == np.int32 or pair.dtype != "float64" else np.float64
        assert back.dtype == expected, f"{values.dtype} comes back as {back.dtype}"
        equal("what comes back", back, values)


@case()
def float32_on_demand(pair: Pair) -> None:
    """What is trained keeps its last bits."""
    values = pair.random.standard_normal((3, 5), np.float32)
    equal("what comes back", pair.backend.numpy(pair.backend.array(values, "float32")).astype(np.float32), values)
    equal("integers", pair.backend.numpy(pair.backend.array(int32(1, 70000), "float32")), [1, 70000])


@case()
def arrays_do_not_alias(pair: Pair) -> None:
    """What happens to the host array afterwards is the host's business."""
    values = pair.normal(4, 4)
    kept, a = values.copy(), pair.backend.array(values)
    values[:] = 7.0
    equal("the array", pair.backend.numpy(a), kept)


@case()
def integers_of_any_width(pair: Pair) -> None:
    back = pair.backend.numpy(pair.backend.array(np.array([[1, 2, 70000]], np.int64)))
    equal("dtype", back.dtype, np.dtype(np.int32))
    equal("what comes back", back, [[1, 2, 70000]])


@case()
def zeros_are_zeros(pair: Pair) -> None:
    equal("zeros", pair.backend.numpy(pair.backend.zeros((2, 3))), np.zeros((2, 3)))


@case()
def footprints_grow_with_the_weight(pair: Pair) -> None:
    """Told without preparing anything, and neither forgotten nor beyond what numbers can take."""
    for form in (Dense("float32"), Dense("bfloat16"), Affine(4, 32, "float16"), Affine(8, 64, "float32")):
        small, large = (blank((rows, 128), form) for rows in (64, 128))
        took, twice = pair.backend.footprint(small), pair.backend.footprint(large)
        equal(f"{form}: twice the rows", list(twice), [2 * took.held, 2 * took.mapped])
        most = small.nbytes + 8 * small.size
        assert small.nbytes // 2 <= sum(took) <= most, f"{form}: {small.nbytes} bytes as stored would take {took}"


@case()
def release_and_sync(pair: Pair) -> None:
    weight = pair.backend.prepare(dense(pair.normal(4, 8)))
    pair.backend.sync()
    pair.backend.release(weight)
