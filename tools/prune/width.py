"""Feed-forward channels and attention heads that a model can do without, as many in each layer.

A layer is looked at after those before it have been cut: what it is shown is what it will be shown.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace

import numpy as np

from ...errors import BadOption
from ...models.config import AttentionConfig, LayerConfig, MLPConfig
from ..calibration import Stage, stream
from ..progress import Progress
from ..quantize.statistics import Inputs
from .cutting import Cut, rounded
from .elimination import Eliminated, eliminate
from .events import Score, Scores
from .options import Amount
from .subject import Subject

GROUP = 32  # channels stay in multiples of it where a share is asked for: quantized rows are cut in such groups

Choice = Generator[Progress, None, tuple[Cut, Scores]]


def channels(subject: Subject, cut: Cut) -> Choice:
    """Raises BadOption when none would stay, or where there is no plain feed-forward."""
    plain = [f for layer in cut.config.layers if isinstance(f := layer.feed_forward, MLPConfig)]
    hidden = _only({f.hidden for f in plain}, "channels")
    count = _count(subject.options.channels, hidden, "channels", GROUP)
    taken = yield from _each(subject, cut, "mlp.down", lambda layer: 1, hidden, count, "channels")
    cut, kept, scores = taken
    return replace(cut, channels=kept), scores


def heads(subject: Subject, cut: Cut) -> Choice:
    """Key/value heads, each with the queries that read it."""
    attentions = [layer.mixer for layer in cut.config.layers if isinstance(layer.mixer, AttentionConfig)]
    total = _only({a.kv_heads for a in attentions}, "heads")
    count = _count(subject.options.heads, total, "heads")
    taken = yield from _each(
        subject, cut, "attn.o", lambda a: a.mixer.head_dim * (a.mixer.heads // a.mixer.kv_heads), total, count, "heads"
    )
    cut, kept, scores = taken
    return replace(cut, heads=kept), scores


def _only(totals: set[int], what: str) -> int:
    if len(totals) != 1:
        found = "no layer has any" if not totals else f"its layers have {' or '.join(map(str, sorted(totals)))}"
        raise BadOption(f"This model's {what} cannot be cut alike: {found}.", f"Leave --{what} out.")
    return totals.pop()


def _count(amount: Amount, total: int, what: str, multiple: int = 1) -> int:
    count = amount.of(total)
    if amount.share is not None:
        count = total - max(multiple, round((total - count) / multiple) * multiple)
    if not 0 < count < total:
        raise BadOption(
            f"--{what} would drop {count} of {total} {what}, which leaves nothing to drop or to keep.",
            f"Give 1 to {total - 1}.",
        )
    return count


def _each(
    subject: Subject, cut: Cut, part: str, size: Callable[[LayerConfig], int], total: int, count: int, what: str
) -> Generator[Progress, None, tuple[Cut, dict[int, np.ndarray], Scores]]:
    """The same number out of every layer that has the part; size: columns of the part's matrix that go together."""
    windows = yield from subject.windows(cut.tokens)
    kept, tensors, rows = {}, dict(cut.tensors), []
    for stage in stream(subject.config, subject.parameters, subject.ops, windows):
        i = int(stage.prefix.rpartition(".")[2]) if "." in stage.prefix else -1
        if i >= 0 and i not in cut.layers:
            stage.skip()
            continue
        for name in stage.names:
            if name in tensors:
                stage.replace(name, tensors[name])
        name = f"{stage.prefix}.{part}"
        if name not in stage.names:
            continue
        yield Progress(f"Choosing {what}", i, len(cut.config.layers), "layers")
        found = _eliminated(subject, stage, name, size(cut.config.layers[i]), count)
        tensors[name] = rounded(found.weight, subject.parameters[name])
        stage.replace(name, tensors[name])
        kept[i] = found.kept
        rows.append(Score(f"layer {i}", found.loss, len(found.kept), total))
    return replace(cut, tensors=tensors), kept, Scores(what, "share of output lost", tuple(rows))


def _eliminated(subject: Subject, stage: Stage, name: str, size: int, count: int) -> Eliminated:
    inputs = Inputs()

    def listen(tap: str, x: np.ndarray) -> None:
        if tap == f"{name}.input":
            inputs(tap, x)

    stage.observe(listen)
    return eliminate(subject.numbers(name), inputs.gram(name), size, count, subject.options.repair)
