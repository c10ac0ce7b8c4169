"""Perplexity and divergence against the same numbers from whole logits; backends side by side, one of them wrong."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from ondevice.backends.base import Step
from ondevice.checkpoint import open_checkpoint
from ondevice.errors import BadFile, BadOption
from ondevice.models.config import ModelConfig
from ondevice.models.decoder import Decoder
from ondevice.models.random import random_weights
from ondevice.registry import create_backend
from ondevice.tools.convert import convert, plan
from ondevice.tools.evaluate.backends import compare
from ondevice.tools.evaluate.text import Evaluation, Predictions, Progress, evaluate, evaluate_together, windows
from ondevice.tools.fuse.drift import drift
from tests.tiny_model import write_tiny_model

HF = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97,
    "intermediate_size": 96, "max_position_embeddings": 200, "tie_word_embeddings": True,
}  # fmt: skip


class Letters:
    """A tokenizer of one token a character."""

    def encode(self, text: str, **_) -> list[int]:
        return [ord(c) % 97 for c in text]

    def bytes_of(self, id: int) -> bytes:
        return b"x" if id else b""


def session(bits: int):
    ops = create_backend("reference")
    config = ModelConfig.llama_like(HF)
    decoder = Decoder(config, ops, random_weights(config, ops, bits))
    return SimpleNamespace(decoder=decoder, config=config, tokenizer=Letters(), path=f"random-{bits}", kv_dtype=None)


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
    scored_bytes = sum(1 for id in following if id)
    assert result.bits_per_byte == pytest.approx(198 * np.log2(result.perplexity) / scored_bytes)


@pytest.mark.parametrize(("loss", "perplexity"), [(700.0, np.exp(700)), (800.0, np.inf), (np.nan, np.nan)])
def test_a_model_cut_to_pieces_still_has_a_perplexity(loss, perplexity):
    found = Predictions(np.full(4, loss, np.float32), np.zeros(4, np.int32)).perplexity
    assert found == pytest.approx(perplexity, nan_ok=True)


def test_the_worst_places_are_found_with_what_stands_before_them():
    model, reference = session(4), session(32)
    *_, alone = evaluate(model, TEXT, context=70, tokens=201)
    *_, result = evaluate(model, TEXT, context=70, tokens=201, against=reference)
    ids = Letters().encode(TEXT)[:201]
    cut = [ids[:70], ids[70:140], ids[140:201]]
    p = np.concatenate([logprobs(model, w) for w in cut])
    q = np.concatenate([logprobs(reference, w) for w in cut])
    places = [at for w in range(3) for at in range(70 * w + 1, 70 * w + len(cut[w]))]
    losses = -p[np.arange(198), [ids[at] for at in places]]
    divergences = (np.exp(q) * (q - p)).sum(-1)
    for found, measure in ((alone.worst(5), losses), (result.worst(5), divergences)):
        order = np.argsort(-measure)[:5]
        assert [miss.position for miss in found] == [places[at] for at in order]
        for miss, at in zip(found, order, strict=True):
            assert miss.token == ids[miss.position] and miss.loss == pytest.approx(losses[at], rel=1e-4)
            before = ids[places[at] // 70 * 70 : places[at]]
            assert list(miss.before) == before[-16:] and miss.likeliest == p[at].argmax()
    assert result.worst(1)[0].kl == pytest.approx(divergences.max(), rel=1e-3)
    assert result.worst(1)[0].wanted == q[divergences.argmax()].argmax() and alone.worst(1)[0].kl is None


def test_several_models_share_one_pass_of_the_reference():
    models, reference = [session(4), session(8)], session(32)
    calls = []
    hidden = reference.decoder.hidden
    reference.decoder.hidden = lambda *args: calls.append(1) or hidden(*args)
    *_, together = evaluate_together(models, TEXT, 70, 201, reference)
    assert len(calls) == 3
    for model, result in zip(models, together, strict=True):
        *_, alone = evaluate(model, TEXT, 70, 201, reference)
        assert alone.facts() == pytest.approx(result.facts())
    assert together[0].kl != together[1].kl


def test_a_model_against_itself_has_no_divergence():
    model = session(8)
    *_, result = evaluate(model, TEXT, context=64, against=model)
    assert result.kl == 0 and result.top1 == 1


@pytest.mark.parametrize("which", [0, 1])
def test_predictions_that_are_no_numbers_are_no_measurement(which):
    """Of the model or of the reference, in eval as in fuse, which took NaN for no loss at all."""
    models = [session(32), session(32)]
    head = models[which].decoder.head
    models[which].decoder.head = lambda *given: head(*given) * np.float32("nan")
    with pytest.raises(BadFile, match="predictions are NaN"):
        list(evaluate(models[0], TEXT, context=64, against=models[1]))
    with pytest.raises(BadFile, match="predictions are NaN"):
        drift(models[0].decoder, models[1].decoder, np.arange(64).reshape(1, -1))


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


# ------------------------------------------------------------------------------------------------ the command line


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model, itself rounded to bfloat16, and a text."""
    root = tmp_path_factory.mktemp("models")
    write_tiny_model(root / "whole")
    with open_checkpoint(root / "whole") as checkpoint:
        convert(plan(checkpoint, "bfloat16"), root / "rounded")
    (root / "text.txt").write_text("It was the end of the day, and then the rain began again. " * 8)
    return root


def ondevice(folder, *args):
    command = [
        sys.executable,
        "-m",
        "ondevice",
        "eval",
        *map(str, args),
        "--text",
        "text.txt",
        "--backend",
        "reference",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=folder)
    assert "Traceback" not in done.stderr
    return done


def test_a_table_of_models(folders):
    done = ondevice(folders, "rounded", "whole", "--against", "whole", "--window", "64", "--json")
    found = json.loads(done.stdout)
    rounded, whole = found["models"]
    assert (rounded["model"], whole["model"], found["against"]) == ("rounded", "whole", "whole")
    assert whole["kl"] == 0 < rounded["kl"] < 0.01 and whole["top1"] == 1
    assert rounded["bytes"] * 2 == whole["bytes"] == found["reference"]["bytes"]
    assert (rounded["bits_per_weight"], whole["bits_per_weight"]) == (16, 32)
    shown = ondevice(folders, "rounded", "whole", "--against", "whole", "--window", "64").stdout
    assert "whole (reference)" in shown and "same top-1" in shown and f"{rounded['bits_per_byte']:.4f}" in shown


def test_one_model_with_its_worst_places_and_a_picture(folders):
    pytest.importorskip("matplotlib")
    done = ondevice(folders, "rounded", "--worst", "3", "--plot", "loss.svg", "--json")
    found = json.loads(done.stdout)
    assert [miss["loss"] for miss in found["worst"]] == sorted((m["loss"] for m in found["worst"]), reverse=True)
    assert found["worst"][0]["loss"] > np.log(found["perplexity"]) and len(found["worst"]) == 3
    assert "mean loss" in (folders / "loss.svg").read_text() or (folders / "loss.svg").stat().st_size > 5000
    assert ondevice(folders, "rounded", "--worst", "1").stdout.count("likeliest [") == 1


def test_a_picture_without_a_name_for_it_is_refused_before_work(folders):
    done = ondevice(folders, "rounded", "--plot", "loss.doc")
    assert done.returncode == 2 and ".png" in done.stderr and done.stdout == ""


def test_a_window_fits_the_model_where_none_is_asked_for(folders):
    small = write_tiny_model(folders / "small", context=64)
    done = ondevice(folders, small, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["context"] == 64, done.stderr
    asked = ondevice(folders, small, "--window", "65")
    assert asked.returncode == 2 and "A window of 65 tokens is more than the model's 64" in asked.stderr


def test_nothing_to_verify_by(folders):
    command = [sys.executable, "-m", "ondevice", "verify", str(folders / "whole"), "--prompt", "", "--backend", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "The prompt has no tokens." in done.stderr
