"""A model run stage by stage over a calibration set: one layer's weights and one layer's activations at a time.

The caller sees what flows into each linear map, may put another weight in its place, and what follows is fed by the
layer as it then is: later layers learn to live with what was done to earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from ...backends.base import A, Backend, Step, W
from ...models.config import ModelConfig
from ...models.decoder import Decoder
from ...models.parameters import Parameters
from ...tensors import Tensor

TOKENS = 2048  # that go through a layer at once

Listener = Callable[[str, np.ndarray], None]


@dataclass
class Stage:
    """One part of the model with all that flows into it.

    prefix: "embed", "layers.7" or "head". names: its parameters, by our names. inputs: what it is fed, a batch an
    entry: ids [B, T] int32 for the embedding, activations [B, T, D] float32 for the rest.
    """

    prefix: str
    names: tuple[str, ...]
    inputs: list[np.ndarray]
    _decoder: Decoder
    _parameters: Parameters
    _weights: dict[str, W]
    _outputs: list[np.ndarray] | None = field(default=None, repr=False)

    def __getitem__(self, name: str) -> Tensor:
        """The parameter as the checkpoint has it."""
        return self._parameters[name]

    def observe(self, listener: Listener) -> None:
        """Run the stage as it is now; the listener is shown every tap (`layers.7.attn.q.input`, …) of every batch."""
        ops = self._decoder.ops
        self._decoder.listener = lambda name, x: listener(name, ops.numpy(x))
        try:
            self._outputs = self._run()
        finally:
            self._decoder.listener = None

    def replace(self, name: str, tensor: Tensor) -> None:
        """Put another weight in place of `name`, here and in the stages that follow (a tied head)."""
        ops = self._decoder.ops
        ops.release(self._weights[name])
        self._weights[name] = ops.prepare(tensor)
        self._outputs = None

    def skip(self) -> None:
        """As if the stage were not there: what flows in flows out."""
        self._outputs = self.inputs

    def outputs(self) -> list[np.ndarray]:
        """What the stage makes of its inputs with the weights it has now; computed once. Not kept for the head, whose
        logits are as many as the vocabulary."""
        if self._outputs is None:
            self._outputs = self._run()
        return self._outputs

    def _run(self) -> list[np.ndarray]:
        decoder = self._decoder
        ops, p, outputs = decoder.ops, decoder.scope(), []
        for batch in self.inputs:
            made = self._forward(p, ops.array(batch), Step.whole(*batch.shape[:2]))
            if self.prefix != "head":
                outputs.append(np.array(ops.numpy(made)))
        return outputs

    def _forward(self, p, x: A, step: Step) -> A:
        if self.prefix == "embed":
            return self._decoder.embed(p, x)
        if self.prefix == "head":
            return self._decoder.head(p, x)
        return self._decoder.block(p, int(self.prefix.rpartition(".")[2]), x, step)


def stream(
    config: ModelConfig, parameters: Parameters, ops: Backend, ids: np.ndarray, tokens: int = TOKENS
) -> Iterator[Stage]:
    """The embedding, each layer and the head, in turn, over ids [N, T], about `tokens` at once. A stage's weights live
    until the next is asked for (a tied embedding until the end)."""
    rows = max(1, tokens // ids.shape[1])
    flow = [np.ascontiguousarray(ids[at : at + rows], np.int32) for at in range(0, len(ids), rows)]
    weights: dict[str, W] = {}
    decoder = Decoder(config, ops, weights)
    for prefix, names in stages(config, parameters):
        weights |= {name: ops.prepare(parameters[name]) for name in names if name not in weights}
        stage = Stage(prefix, names, flow, decoder, parameters, weights)
        yield stage
        if prefix != "head":
            flow = stage.outputs()
        for name in names:
            if prefix == "head" or not (config.tied and name == "embed"):
                ops.release(weights.pop(name))
                for stored in parameters.stored(name):
                    parameters.checkpoint.release(stored)


def stages(config: ModelConfig, parameters: Parameters) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Prefix and parameters of each stage, in the order of computation."""
    outer = [name for name in parameters if not name.startswith("layers.")]
    below = [name for name in outer if name in ("embed", "positions")]
    yield "embed", tuple(below)
    for i in range(len(config.layers)):
        prefix = f"layers.{i}"
        yield prefix, tuple(name for name in parameters if name.startswith(f"{prefix}."))
    yield "head", tuple(name for name in outer if name not in below or (config.tied and name == "embed"))
