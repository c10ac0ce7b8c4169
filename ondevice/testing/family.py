"""A family beside transformers: a tiny random twin of the model, its logits compared in every way that tokens can go.

    from ondevice.testing.family import TINY, check_family, randomise

    def test_my_family(tmp_path):
        twin = randomise(MyForCausalLM(MyConfig(**TINY)))
        twin.save_pretrained(tmp_path)
        check_family(tmp_path, twin)

Needs torch, and transformers or whatever else the twin is made of. Nothing here knows a family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.base import Backend, Step
from ..backends.reference import create as create_reference
from ..checkpoint import open_checkpoint
from ..models.decoder import Decoder
from ..models.families import family_of
from ..models.parameters import Parameters

TINY = {  # sizes for a twin's config: odd ones, so that none passes for another
    "vocab_size": 61,
    "hidden_size": 36,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
TOLERANCE = 1e-4  # of the logits' size (root mean square), in float32


def randomise(model: Any, seed: int = 0) -> Any:
    """A torch model with every parameter random, in place; returns it, in float32.

    Matrices keep their inputs' size, so that scores and gates are far from uniform. Vectors (gains, biases,
    buffers that are saved) are moved from where they begin: a gain of 1 or a bias of 0 would hide what is done with it.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    for parameter in model.float().eval().parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        vector = parameter.ndim == 1
        parameter.data = parameter.data + 0.3 * noise if vector else noise * parameter.shape[-1] ** -0.5
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in saved and buffer.is_floating_point():
            buffer += 0.3 * torch.randn(buffer.shape, generator=generator)
    return model


def logits_of(model: Any, ids: np.ndarray) -> np.ndarray:
    """What a transformers model says: ids [B, T] -> logits [B, T, V]."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(ids.astype(np.int64)), use_cache=False).logits.float().numpy()


def open_decoder(path: str | Path, ops: Backend, length: int | None = None) -> Decoder:
    """The decoder of a model folder or file; length: see Decoder. Raises OnDeviceError's children."""
    with open_checkpoint(path) as checkpoint:
        family, hf = family_of(checkpoint)
        config = family.config(hf)
        return Decoder(config, ops, Parameters(family, config, checkpoint).prepare(ops), length)


def check_family(path: str | Path, twin: Any, ops: Backend | None = None, tokens: int = 13, seed: int = 0) -> None:
    """Raises AssertionError unless the model at `path` says on `ops` (the reference, if None) what its twin says: a
    transformers model, or any function from ids [B, T] to logits [B, T, V]. Windows should be shorter than `tokens`."""
    decoder = open_decoder(path, ops or create_reference(), tokens)
    ids = np.random.default_rng(seed).integers(0, decoder.config.vocab, (2, tokens)).astype(np.int32)
    want = logits_of(twin, ids) if hasattr(twin, "save_pretrained") else twin(ids)
    check_decoder(decoder, ids, want)


def check_decoder(decoder: Decoder, ids: np.ndarray, want: np.ndarray, tolerance: float = TOLERANCE) -> None:
    """Raises AssertionError unless the decoder gives the logits `want` [2, T, V] for ids [2, T], T at least 8: at once,
    token by token, in pieces, and in a ragged batch."""
    size = np.sqrt(np.mean(np.square(want, dtype=np.float64)))
    for way in (_at_once, _token_by_token, _in_pieces, _ragged):
        for row, start, got in way(decoder, ids):
            expected = want[row, start : start + len(got)]
            error = np.abs(got - expected) / size
            place = np.unravel_index(int(error.argmax()), error.shape)
            assert error[place] <= tolerance, (
                f"{way.__name__.strip('_')}: row {row}, token {start + place[0]}, logit {place[1]} is {got[place]:.6g} "
                f"instead of {expected[place]:.6g}: {error[place]:.2g} of their size, {tolerance:.2g} allowed"
            )


Rows = Iterator[tuple[int, int, np.ndarray]]  # a row, where its tokens start, their logits [n, V]


def _at_once(decoder: Decoder, ids: np.ndarray) -> Rows:
    """Both rows without a cache."""
    yield from _run(decoder, ids, Step.whole(*ids.shape))


def _token_by_token(decoder: Decoder, ids: np.ndarray) -> Rows:
    """The first row through a cache that it fills to the last place, as the engine decodes."""
    length = ids.shape[1]
    cache = decoder.new_cache(1, length)
    forward = decoder.ops.compile(decoder, [cache, decoder.weights])
    for at in range(length):
        yield from _run(decoder, ids[:1, at : at + 1], _step(cache, [at], [1], [0]), forward)


def _in_pieces(decoder: Decoder, ids: np.ndarray) -> Rows:
    """The first row as a prompt, a longer piece behind it, and the rest."""
    length = ids.shape[1]
    cache = decoder.new_cache(1, length)
    for start, end in ((0, 3), (3, length - 1), (length - 1, length)):
        yield from _run(decoder, ids[:1, start:end], _step(cache, [start], [end - start], [0]))


def _ragged(decoder: Decoder, ids: np.ndarray) -> Rows:
    """Two rows of different lengths in one batch, in slots the other way round, then one more token each."""
    half, full = ids.shape[1] // 2, ids.shape[1] - 1
    cache = decoder.new_cache(3, full + 1)
    padded = np.where(np.arange(full) < np.array([[full], [half]]), ids[:, :full], 0).astype(np.int32)
    yield from _run(decoder, padded, _step(cache, [0, 0], [full, half], [2, 0]))
    behind = ids[[0, 1], [full, half]][:, None]
    yield from _run(decoder, behind, _step(cache, [full, half], [1, 1], [2, 0]))


def _step(cache: Any, starts: list[int], lengths: list[int], slots: list[int]) -> Step:
    """A step over a cache."""
    return Step(*(np.array(values, np.int32) for values in (starts, lengths, slots)), cache=cache)


def _run(decoder: Decoder, ids: np.ndarray, step: Step, forward: Callable | None = None) -> Rows:
    """Runs a step; what comes out at its real tokens, row by row."""
    logits = decoder.ops.numpy((forward or decoder)(decoder.ops.array(ids), step))
    if step.cache is not None:
        step.cache.advance(step.slots, step.lengths)
    for row, (start, length) in enumerate(zip(step.starts, step.lengths, strict=True)):
        yield row, int(start), logits[row, :length].copy()
