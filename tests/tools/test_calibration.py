"""Samples against the tokenizer and the template, the stream against the whole decoder."""

import json

import numpy as np
import pytest

from ondevice.backends.base import Step
from ondevice.errors import BadFile, BadOption
from ondevice.models.config import ModelConfig
from ondevice.models.decoder import Decoder
from ondevice.models.parameters import Parameters
from ondevice.runtime.session import open_session
from ondevice.tensors import dense
from ondevice.tools.calibration import Sampling, samples, stream
from ondevice.tools.calibration.samples import windows
from tests.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    with open_session(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny"), backend="reference") as opened:
        yield opened


def last(events):
    *_, ids = events
    return ids


def test_a_text_is_cut_in_windows_spread_over_it(session, tmp_path):
    source = tmp_path / "text.txt"
    source.write_text("one two the and " * 40)
    whole = np.array(session.tokenizer.encode(source.read_text()))
    ids = last(samples(session, source, tokens=48, length=16))
    assert ids.shape == (3, 16) and ids.dtype == np.int32
    assert (ids[0] == whole[:16]).all()
    held = len(whole) // 16
    assert (ids[2] == whole[(held - 1) * 16 : held * 16]).all()
    assert len(last(samples(session, source, tokens=10**6, length=16))) == held


def test_conversations_go_through_the_template(session, tmp_path):
    talk = [{"role": "user", "content": "and"}, {"role": "assistant", "content": "the <|im_end|> in"}]
    source = tmp_path / "talk.jsonl"
    source.write_text("\n".join(json.dumps({"messages": talk}) for _ in range(4)) + "\n\n" + json.dumps({"text": "on"}))
    one = session.encode_messages(talk, add_generation_prompt=False)
    ids = last(samples(session, source, tokens=2 * len(one), length=len(one)))
    assert ids.tolist() == [one, one]


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"messages": []}', '{"messages": ["hi"]}'])
def test_strange_conversations_are_named_by_line(session, tmp_path, line):
    source = tmp_path / "talk.jsonl"
    source.write_text('{"text": "on"}\n' + line)
    with pytest.raises(BadFile, match="line 2"):
        last(samples(session, source, 64, 8))


def test_too_little_text(session, tmp_path):
    source = tmp_path / "short.txt"
    source.write_text("on")
    with pytest.raises(BadOption, match="less than one calibration window of 64"):
        last(samples(session, source, 64, 64))
    source.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadFile, match="not UTF-8"):
        last(samples(session, source, 64, 64))


def test_a_byte_order_mark_is_no_text(session, tmp_path):
    plain, marked = tmp_path / "plain.txt", tmp_path / "marked.txt"
    plain.write_text("on and on and on")
    marked.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    assert (windows(session, plain, 2) == windows(session, marked, 2)).all()


def test_the_model_writes_its_own_text(session):
    *events, ids = samples(session, None, tokens=40 * 12, length=12)
    assert ids.shape == (40, 12) and all(isinstance(event, Sampling) for event in events)
    assert events[-1].done == events[-1].total == 480
    assert (ids == last(samples(session, None, 480, 12))).all()
    assert (ids != last(samples(session, None, 480, 12, seed=1))).any()
    start = session.tokenizer.encode("<|im_start|>user\n", parse_special=True)
    assert (ids[1::2, : len(start)] == start).all() and len({tuple(row) for row in ids.tolist()}) > 30


@pytest.mark.parametrize(("asked", "shape"), [(70, (4, 65)), (128 + 69, (32, 128)), (10**6, (36, 128))])
def test_it_stops_writing_when_that_is_enough(session, asked, shape):
    """Never with less than SHORTEST tokens a text; what it has written is what it would have."""
    tokens = 36 if asked > 70 else 4  # rows, of which 32 are written side by side
    times = iter(range(10**6))
    ids = last(samples(session, None, tokens * 128, 128, enough=lambda: next(times) >= asked - 69))
    assert ids.shape == shape
    whole = last(samples(session, None, tokens * 128, 128))
    assert (ids == whole[: shape[0], : shape[1]]).all()


def test_what_it_writes_follows_its_own_distribution(session):
    """The second token of documents, by count, against the model's probabilities (chi-squared, loosely)."""
    ids = last(samples(session, None, tokens=2 * 800, length=2))[::2]
    logits = session.decoder(session.backend.array(ids[:1, :1]), Step.whole(1, 1))
    p = np.exp(session.backend.numpy(logits)[0, 0].astype(np.float64))
    p /= p.sum()
    count = np.bincount(ids[:, 1], minlength=len(p))
    assert ((count - len(ids) * p) ** 2 / (len(ids) * p)).sum() < 2 * len(p)


HF = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97,
    "intermediate_size": 96, "max_position_embeddings": 200, "tie_word_embeddings": True, "model_type": "llama",
}  # fmt: skip


def tied(tmp_path):
    """A tied model in a folder, its parameters, and a decoder over all of them."""
    from ondevice.checkpoint import Spec, open_checkpoint, write_folder
    from ondevice.models.families import family_of
    from ondevice.models.parameters import expected

    draw = np.random.default_rng(3)
    family = family_of(type("", (), {"kind": "hf", "config": HF, "path": "x"}))[0]
    made = {n: (draw.normal(size=s) * 0.2).astype(np.float32) for n, s in expected(family.config(HF)).items()}
    specs = [Spec(family.names.spell(n), v.shape, dense(v).format, lambda v=v: dense(v)) for n, v in made.items()]
    write_folder(tmp_path / "tied", HF, specs, {})
    return Parameters(family, family.config(HF), open_checkpoint(tmp_path / "tied"))


def test_the_stream_is_the_decoder(tmp_path):
    from ondevice.registry import create_backend

    parameters, ops = tied(tmp_path), create_backend("reference")
    config = ModelConfig.llama_like(HF)
    ids = np.random.default_rng(0).integers(0, 97, (5, 9)).astype(np.int32)
    decoder, taps, seen = Decoder(config, ops, parameters.prepare(ops)), {}, {}
    decoder.listener = lambda name, x: taps.setdefault(name, []).append(ops.numpy(x))
    decoder(ops.array(ids), Step.whole(5, 9))
    for stage in stream(config, parameters, ops, ids, tokens=20):
        assert [len(batch) for batch in stage.inputs] == [2, 2, 1]
        assert len(stage._weights) <= 1 + len(stage.names)  # this stage's, and the tied embedding
        stage.observe(lambda name, x: seen.setdefault(name, []).append(x))
    taps.pop("logits")
    assert seen.keys() == taps.keys()
    for name, parts in seen.items():
        np.testing.assert_allclose(np.concatenate(parts), np.concatenate(taps[name]), rtol=1e-4, atol=1e-5)


def test_what_is_replaced_is_what_later_layers_see(tmp_path):
    from ondevice.registry import create_backend

    parameters, ops = tied(tmp_path), create_backend("reference")
    config = ModelConfig.llama_like(HF)
    ids = np.arange(12, dtype=np.int32).reshape(2, 6)
    weights, changed = parameters.prepare(ops), {}
    for name in ("embed", "layers.1.mlp.down"):
        values = parameters[name].parts["weight"] * np.float32(1.5)
        changed[name] = dense(values)
        weights[name] = ops.prepare(changed[name])
    seen = {}
    for stage in stream(config, parameters, ops, ids):
        stage.observe(lambda name, x: seen.__setitem__(name, x))
        for name in stage.names:
            if name in changed and stage.prefix != "head":
                stage.replace(name, changed[name])
    decoder, wanted = Decoder(config, ops, weights), {}
    decoder.listener = lambda name, x: wanted.__setitem__(name, ops.numpy(x))
    decoder(ops.array(ids), Step.whole(2, 6))
    np.testing.assert_allclose(seen["head.input"], wanted["head.input"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen["layers.1.mlp.down.input"], wanted["layers.1.mlp.down.input"], rtol=1e-4, atol=1e-5)
