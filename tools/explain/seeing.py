"""What goes on inside a model while it reads: the stream behind every block, and who attends to whom.

Attention is worked out again from the tapped queries and keys, because the operation keeps its weights to itself:
softmax of softcap(scale * q . k) over the positions that the layer lets a token see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ...backends.base import A, AttentionSpec, Step
from ...errors import Unsupported
from ...models.decoder import Decoder

TAPS = {"attn": ("q", "k"), "latent": ("q", "turning_q", "latent", "turning_k")}  # of the two kinds of attention


@dataclass(frozen=True)
class Seen:
    """stream: what the embedding and then each block gave, arrays of the backend [1, T, D]. attention: layer ->
    [H, T, T] float32, rows are the tokens that look; layers that keep a state instead are not in it."""

    stream: tuple[A, ...] = field(repr=False)
    attention: dict[int, np.ndarray] = field(repr=False)


def see(decoder: Decoder, ids: Sequence[int]) -> Seen:
    """One pass over the ids, watched. Raises Unsupported behind a soft prompt, whose places are no tokens."""
    if decoder.soft:
        raise Unsupported("Behind a soft prompt there is nothing to explain token by token.", "Leave out the adapter.")
    ops, heard, before = decoder.ops, {}, decoder.listener
    blocks = range(len(decoder.config.layers))

    def listen(name: str, x: A) -> None:
        *_, mixer, part = name.rsplit(".", 2)
        if part in TAPS.get(mixer, ()):
            heard[name] = np.array(ops.numpy(x), np.float32)[0]

    decoder.listener = listen
    try:
        step, p = Step.whole(1, len(ids)), decoder.scope()
        stream = [decoder.embed(p, ops.array(np.array([ids], np.int32)), step)]
        for i in blocks:
            stream.append(decoder.block(p, i, stream[-1], step))
    finally:
        decoder.listener = before
    attention = {}
    for i in blocks:
        seen = [[heard.get(f"layers.{i}.{mixer}.{part}") for part in parts] for mixer, parts in TAPS.items()]
        plain, latent = (parts if parts[0] is not None else None for parts in seen)
        if plain or latent:
            q, k = plain or _latent(decoder, i, *latent)
            attention[i] = attention_weights(q, k, decoder.config.layers[i].mixer.spec, _sinks(decoder, i))
    return Seen(tuple(stream), attention)


def _latent(
    decoder: Decoder, layer: int, q: np.ndarray, turning_q: np.ndarray, latent: np.ndarray, turning_k: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Queries and keys [T, H, d] of latent attention: what is made from the latent, and behind it what turns, which all
    heads share."""
    up = decoder.ops.numpy(decoder.ops.dequantize(decoder.weights[f"layers.{layer}.latent.k_up"]))
    k = np.einsum("tl,hnl->thn", latent, up)
    turning = np.broadcast_to(turning_k[:, None], (*k.shape[:2], turning_k.shape[-1]))
    return np.concatenate([q, turning_q], -1), np.concatenate([k, turning], -1)


def _sinks(decoder: Decoder, layer: int) -> np.ndarray | None:
    """[H] float32: the score of looking nowhere, where a layer has one."""
    weight = decoder.weights.get(f"layers.{layer}.attn.sinks")
    return None if weight is None else decoder.ops.numpy(decoder.ops.dequantize(weight))


def attention_weights(q: np.ndarray, k: np.ndarray, spec: AttentionSpec, sinks: np.ndarray | None = None) -> np.ndarray:
    """q [T, H, d], k [T, K, d], both turned by their positions -> [H, T, T] float32; query head h reads key head
    h // (H / K). Rows sum to 1, less what goes to a sink."""
    tokens, heads, _ = q.shape
    keys = np.repeat(k, heads // k.shape[1], axis=1)
    scores = np.einsum("thd,shd->hts", q.astype(np.float64), keys.astype(np.float64)) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * np.tanh(scores / spec.softcap)
    scores = np.where(visible(tokens, spec), scores, -np.inf)
    most = scores.max(-1, keepdims=True)
    if sinks is not None:
        most = np.maximum(most, sinks[:, None, None])
    powers = np.exp(scores - most)
    total = powers.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks[:, None, None] - most)
    return (powers / total).astype(np.float32)


def visible(tokens: int, spec: AttentionSpec) -> np.ndarray:
    """bool [T, T]: whether token i (rows) sees token j."""
    i, j = np.arange(tokens)[:, None], np.arange(tokens)[None, :]
    seen = j <= i
    if spec.window is not None:
        seen &= i - j < spec.window
    if spec.chunk is not None:
        seen &= i // spec.chunk == j // spec.chunk
    return seen
