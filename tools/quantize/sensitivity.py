"""How much each number of a model matters: curvature of the divergence from the model's own predictions.

To second order, KL(model || changed model) is half the mean of (g . dW x)^2, where x flows into a matrix and g is the
gradient of the loss at its output, the labels drawn from the model itself (Fisher information; Martens 2014). With
inputs and gradients taken as independent (Kronecker factors, Martens and Grosse 2015) that is half the sum over outputs
i and inputs j, k of E[g_i^2] dW_ij E[x_j x_k] dW_ik; and once feedback has done what it can (GPTQ), what is left of
E[x x^T] is the diagonal of its LDL^T factors. So two vectors say what an error anywhere in a matrix costs.

One pass forward and one back over a few thousand tokens, layer by layer: peak memory is the input of every layer, in
bfloat16, and one layer's tape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import noise
from ...backends.base import A, Backend, Step, W
from ...models.config import ModelConfig
from ...models.decoder import Decoder
from ...models.parameters import Parameters
from ...tensors import bf16_to_f32, f32_to_bf16
from ..calibration import stream
from .gptq import remaining
from .matrices import matrices
from .statistics import Inputs

ROWS = 128  # predictions whose logits are held at once
TOKENS = 1024  # that go back through a layer at once


@dataclass(frozen=True)
class Cost:
    """Half the mean squared change of the loss for an error of 1 is half of outputs[i] * inputs[j], for a matrix
    [O, I]; for a stack of experts both have a row each."""

    outputs: np.ndarray
    inputs: np.ndarray

    def of(self, errors: np.ndarray, rows: Any = slice(None)) -> float:
        """What these errors of these rows cost, in nats a token. errors [..., R, I]"""
        by_row = np.einsum("...ri,...i->...r", np.square(errors), self.inputs)
        return 0.5 * float((by_row * self.outputs[..., rows]).sum(dtype=np.float64))


@dataclass(frozen=True)
class Measured:
    """costs: of every matrix, by our names. hessians: of embedding and head, [D, D], the same for all rows."""

    costs: dict[str, Cost]
    hessians: dict[str, np.ndarray]


class Probing:
    """A backend whose linear maps add a probe: the gradient at a probe of zeros is the one at the output."""

    def __init__(self, ops: Backend, names: dict[int, str]):
        self._ops, self._names, self.probes = ops, names, {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def linear(self, x: A, weight: W, bias: W | None = None) -> A:
        return self._probed(self._ops.linear(x, weight, bias), weight)

    def expert_linear(self, x: A, weight: W, routing: Any, bias: W | None = None) -> A:
        return self._probed(self._ops.expert_linear(x, weight, routing, bias), weight)

    def _probed(self, y: A, weight: W) -> A:
        probe = self.probes.get(self._names.get(id(weight)))
        return y if probe is None else y + probe


def measure(
    config: ModelConfig, parameters: Parameters, ops: Backend, ids: np.ndarray, seed: int = 0
) -> Iterator[tuple[int, int] | Measured]:
    """Yields (done, total) steps of like length and ends with Measured. `ops` needs the feature training."""
    layers, kept, after = len(config.layers), [], {}
    total = 6 * layers + 2
    for stage in stream(config, parameters, ops, ids, TOKENS):
        if stage.prefix == "head":
            head = _Head(config, parameters, ops, seed)
            grads = [head.back(batch) for batch in stage.inputs]
        elif stage.prefix != "embed":
            after |= _left_after_feedback(stage, parameters)
            kept.append([f32_to_bf16(batch) for batch in stage.inputs])
            yield len(kept), total
    costs: dict[str, Cost] = {}
    for i in reversed(range(layers)):
        inputs = [bf16_to_f32(batch) for batch in kept.pop()]
        squares, grads = _back(config, parameters, ops, i, inputs, grads, after)
        costs |= {name: Cost(square / ids.size, after.pop(name)) for name, square in squares.items()}
        yield total - 5 * i, total
    yield Measured(*head.rest(costs, grads, ids))


def _left_after_feedback(stage, parameters: Parameters) -> dict[str, np.ndarray]:
    """What remains of E[x_j^2] once later columns make up for what they can, of each matrix of a layer."""
    inputs, found, seen = Inputs(), {}, {}
    stage.observe(inputs)
    for name in matrices(parameters, stage.prefix):
        shape = parameters.shapes[name]
        if len(shape) > 2:
            grams = inputs.expert_grams(name, shape[0])
            found[name] = np.stack([remaining(gram) if count else np.zeros(shape[-1]) for count, gram in grams])
            continue
        key = inputs.source(name)
        if key not in seen:
            seen[key] = remaining(inputs.gram(name))
        found[name] = seen[key]
    return found


def _back(
    config: ModelConfig, parameters: Parameters, ops: Backend, layer: int, inputs: list[np.ndarray],
    grads: list[np.ndarray], names: dict[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:  # fmt: skip
    """One layer, from the gradients at its output to those at its input; on the way, by matrix, the sum over tokens of
    the squared gradient of each output, [O] or [E, O]."""
    prefix = f"layers.{layer}."
    weights = {name: ops.prepare(parameters[name]) for name in parameters if name.startswith(prefix)}
    probing = Probing(ops, {id(weights[name]): name for name in names if name.startswith(prefix)})
    decoder = Decoder(config, probing, weights)
    squares: dict[str, np.ndarray] = {}
    back = []
    for x, grad in zip(inputs, grads, strict=True):
        probes, experts = _probes(decoder, layer, x, parameters, prefix, names)
        found = _pulled(decoder, probing, layer, ops.array(x), ops.array(grad), probes)
        back.append(np.array(ops.numpy(found.pop("x"))))
        for name, at_output in found.items():
            square = _summed(np.square(ops.numpy(at_output)), experts, parameters.shapes[name])
            squares[name] = squares.get(name, 0) + square
    for weight in weights.values():
        ops.release(weight)
    return squares, back


def _probes(
    decoder: Decoder, layer: int, x: np.ndarray, parameters: Parameters, prefix: str, names: dict[str, np.ndarray]
) -> tuple[dict[str, A], np.ndarray | None]:
    """Zeros of the shape of each matrix's output; and which experts each token went to, where there are any."""
    ops, (B, T, _) = decoder.ops, x.shape
    chosen = [name for name in names if name.startswith(prefix)]
    rows: dict[str, tuple[int, ...]] = {}
    experts: list[np.ndarray] = []

    def listen(name: str, a: A) -> None:
        map, _, kind = name.rpartition(".")
        if kind == "experts":
            experts.append(ops.numpy(a))
        elif kind == "input":
            rows[map] = a.shape[:-1]

    if any(".moe." in name for name in chosen):  # there tokens are a flat list
        decoder.listener = listen
        decoder.block(decoder.scope(), layer, ops.array(x), Step.whole(B, T))
        decoder.listener = None
    probes = {}
    for name in chosen:
        shape = parameters.shapes[name]
        lead = experts[0].shape if len(shape) > 2 else rows.get(name, (B, T))
        probes[name] = ops.zeros((*lead, shape[-2]))
    return probes, experts[0] if experts else None


def _pulled(decoder: Decoder, probing: Probing, layer: int, x: A, grad: A, probes: dict[str, A]) -> dict[str, A]:
    """Gradients at the layer's input (x) and at the output of each probed matrix."""

    def through(params, grad):
        probing.probes = {name: probe for name, probe in params.items() if name != "x"}
        x = params["x"]
        out = decoder.block(decoder.scope(), layer, x, Step.whole(*x.shape[:2]))
        return decoder.ops.sum(out * grad), None

    _, grads = decoder.ops.value_and_grad(through)({"x": x, **probes}, grad)
    probing.probes = {}
    return dict(grads)


def _summed(squares: np.ndarray, experts: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """Over tokens; by expert where the matrix is a stack."""
    if len(shape) == 2:
        return squares.reshape(-1, shape[0]).sum(0, dtype=np.float64)
    return np.stack([squares[experts == e].sum(0, dtype=np.float64) for e in range(shape[0])])


class _Head:
    """The loss and its gradient, a few predictions at a time; and what an error in embedding and head costs."""

    def __init__(self, config: ModelConfig, parameters: Parameters, ops: Backend, seed: int):
        self.config, self.ops, self.seed, self.tokens = config, ops, seed, 0
        self.name = "embed" if config.tied else "head"
        outer = {name for name in parameters if not name.startswith("layers.")} - {"embed", "positions"}
        weights = {name: ops.prepare(parameters[name]) for name in outer | {self.name}}
        self.decoder = Decoder(config, ops, weights)
        self.gram = np.zeros((config.width, config.width))
        self.likely, self.curvature = np.zeros((2, config.vocab))  # sums of p and p (1 - p)

    def back(self, batch: np.ndarray) -> np.ndarray:
        """[B, T, D] -> the gradient of the summed loss there."""
        flat = batch.reshape(-1, batch.shape[-1])
        pieces = [self._piece(flat[at : at + ROWS]) for at in range(0, len(flat), ROWS)]
        return np.concatenate(pieces).reshape(batch.shape)

    def _piece(self, x: np.ndarray) -> np.ndarray:
        ops, decoder = self.ops, self.decoder
        decoder.listener = self._heard
        logits = ops.numpy(decoder.head(decoder.scope(), ops.array(x)))
        decoder.listener = None
        labels = self._labels(logits)

        def loss(params):
            return ops.sum(ops.token_loss(decoder.head(decoder.scope(), params["x"]), ops.array(labels))), None

        return np.array(ops.numpy(ops.value_and_grad(loss)({"x": ops.array(x)})[1]["x"]))

    def _heard(self, name: str, x: A) -> None:
        if name == "head.input":
            x = self.ops.numpy(x)
            self.gram += x.T @ x

    def _labels(self, logits: np.ndarray) -> np.ndarray:
        """Drawn from the model's own predictions, which are counted on the way."""
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        self.likely += p.sum(0, dtype=np.float64)
        self.curvature += (p * (1 - p)).sum(0, dtype=np.float64)
        draws = noise.uniform(self.seed, "sensitivity", self.tokens, (len(p), 1))
        self.tokens += len(p)
        running = np.cumsum(p, -1)
        return np.minimum((running < draws * running[:, -1:]).sum(-1), p.shape[-1] - 1).astype(np.int32)

    def rest(
        self, costs: dict[str, Cost], grads: list[np.ndarray], ids: np.ndarray
    ) -> tuple[dict[str, Cost], dict[str, np.ndarray]]:
        """Costs with embedding and head added, and both Hessians. grads: at what the embedding gives.

        An error in row v of the embedding matters as often as v is read, one of the head by p (1 - p); how often v is
        read, where the calibration has not read it, is as likely as the model holds it to be.
        """
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        scale = self.config.embed_scale * self.config.input_scale
        read = sum(g.T.astype(np.float64) @ g for g in flat) / self.tokens * scale**2
        head, often, bent = self.gram / self.tokens, self.likely / self.tokens, self.curvature / self.tokens
        hessians = {"embed": read + bent.sum() * head} if self.config.tied else {"embed": read, "head": head}
        rows = {"embed": often, "head": bent}
        ends = {name: Cost(rows[name], remaining(hessian)) for name, hessian in hessians.items()}
        return costs | ends, hessians
