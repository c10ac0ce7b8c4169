"""Perplexity and divergence against the same numbers from whole logits; backends side by side, one of them wrong."""

from types import SimpleNamespace

import numpy as np
import pytest

from ondevice.backends.base import Step
from ondevice.errors import BadOption
from ondevice.models.config import ModelConfig
from ondevice.models.decoder import Decoder
from ondevice.models.random import random_weights
from ondevice.registry import create_backend
from ondevice.tools.evaluate.backends import compare
from ondevice.tools.evaluate.text import Evaluation, Progress, evaluate, windows

HF = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97,
    "intermediate_size": 96, "max_position_embeddings": 200, "tie_word_embeddings": True,
}  # fmt: skip


class Letters:
    """A tokenizer of one token a character."""

    def encode(self, text: str, **_) -> list[int]:
        return [ord(c) % 97 for c in text]


def session(bits: int):
    ops = create_backend("reference")
    config = ModelConfig.llama_like(HF)
    decoder = Decoder(config, ops, random_weights(config, ops, bits))
    return SimpleNamespace(decoder=decoder, config=config, tokenizer=Letters(), path=f"random-{bits}")


def logprobs(s, window):
    ids = s.decoder.ops.array(np.array([window], np.int32))
    logits = s.decoder.ops.numpy(s.decoder(ids, Step.whole(1, len(window))))[0, :-1].astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


TEXT = "The jargon of hackers, in alphabetical order; " * 5


def test_equals_the_definition():
    model, reference = session(4), session(32)
    events = list(evaluate(model, TEXT, context=70, tokens=201, against=reference))
    result = events[-1]
    assert isinstance(result, Evaluation) and isinstance(events[0], Progress)
    ids = Letters().encode(TEXT)[:201]
    cut = [ids[:70], ids[70:140], ids[140:201]]
    p = np.concatenate([logprobs(model, w) for w in cut])
    q = np.concatenate([logprobs(reference, w) for w in cut])
    following = np.concatenate([w[1:] for w in cut])
    assert result.tokens == 201 and result.scored == len(following) == 198
    assert result.perplexity == pytest.approx(np.exp(-p[np.arange(198), following].mean()), rel=1e-5)
    assert result.reference_perplexity == pytest.approx(np.exp(-q[np.arange(198), following].mean()), rel=1e-5)
    assert result.kl == pytest.approx((np.exp(q) * (q - p)).sum(-1).mean(), rel=1e-4)
    assert result.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())


def test_a_model_against_itself_has_no_divergence():
    model = session(8)
    *_, result = evaluate(model, TEXT, context=64, against=model)
    assert result.kl == 0 and result.top1 == 1


def test_a_last_window_of_one_token_is_left_out():
    assert [len(w) for w in windows(range(129), 64, None)] == [64, 64]
    assert [len(w) for w in windows(range(130), 64, None)] == [64, 64, 2]
    assert [len(w) for w in windows(range(130), 64, 65)] == [64]


@pytest.mark.parametrize(("text", "context"), [("x", 10), (TEXT, 1), (TEXT, 201)])
def test_what_cannot_be_scored_is_said(text, context):
    with pytest.raises(BadOption):
        list(evaluate(session(32), text, context=context))


def test_other_tokens_cannot_be_compared():
    other = session(32)
    other.tokenizer = SimpleNamespace(encode=lambda text, **_: [1] * len(text))
    with pytest.raises(BadOption, match="different tokens"):
        list(evaluate(session(32), TEXT, context=64, against=other))


def test_a_wrong_or_broken_backend_is_noticed():
    ops = create_backend("reference")
    wanted = {"layers.0.output": np.ones((2, 3)), "logits": np.eye(3)}
    assert compare(ops, wanted, wanted).agrees
    off = {"layers.0.output": np.ones((2, 3)) + 1e-3, "logits": np.eye(3)}
    broken = {"layers.0.output": np.full((2, 3), np.nan), "logits": np.eye(3)}
    assert not compare(ops, wanted, off).agrees
    assert not compare(ops, wanted, broken).agrees
