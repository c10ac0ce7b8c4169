"""What a run leaves, loaded by those it is for."""

from __future__ import annotations

import numpy as np
import pytest

from ondevice.errors import BadOption
from ondevice.runtime.session import open_session
from ondevice.testing.family import logits_of
from ondevice.train import Settings, load_data, train

IDS = np.array([[5, 17, 80, 3, 44, 61, 9, 102]], np.int32)


def logits(session) -> np.ndarray:
    from ondevice.backends.base import Step

    ids = session.backend.array(IDS)
    return session.backend.numpy(session.decoder(ids, Step.whole(*IDS.shape)))


def trained(session, data_file, dest, **settings):
    data = load_data(data_file, session, 64)
    return list(train(session, data, Settings(steps=6, learning_rate=1e-2, **settings), dest))[-1]


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_peft_sees_what_we_see(tiny, session, data_file, tmp_path, method):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    targets = ("q_proj:3", "down_proj:5:7") if method == "dora" else ("all-linear", "embed_tokens:4", "lm_head:2")
    trained(session, data_file, tmp_path / "out", method=method, targets=targets)
    network = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "out")
    theirs = logits_of(network.float().eval(), IDS)
    before = logits(session)
    session.adapt([(tmp_path / "out", 1.0)])
    try:
        ours = logits(session)
    finally:
        session.adapt([])
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.abs(ours - before).max() > 0.1


@pytest.mark.parametrize("saved", [("embed_tokens",), ("lm_head", "model.norm")])
def test_peft_reads_what_was_trained_whole(tiny, session, data_file, tmp_path, saved):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    finished = trained(session, data_file, tmp_path / "out", modules_to_save=saved)
    network = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "out")
    theirs = logits_of(network.float().eval(), IDS)
    session.adapt([(tmp_path / "out", 1.0)])
    try:
        ours = logits(session)
    finally:
        session.adapt([])
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert {name for name in finished.parameters if not name.endswith(("down", "up"))} == {
        {"embed_tokens": "embed", "lm_head": "head", "model.norm": "norm"}[name] for name in saved
    }


def test_what_is_trained_whole_goes_where_full_training_goes(session, data_file):
    """LoRA's factors begin at no change, so the first step sees the same gradient."""
    data = load_data(data_file, session, 64, validation=0)
    common = {"steps": 1, "learning_rate": 1e-2, "clip": 0.0}
    *_, part = train(session, data, Settings(modules_to_save=("embed_tokens",), **common))
    *_, full = train(session, data, Settings(method="full", **common))
    np.testing.assert_allclose(part.parameters["embed"], full.parameters["embed"], atol=2e-5)


def test_a_weight_is_trained_in_one_way(session, data_file):
    both = Settings(targets=("q_proj",), modules_to_save=("q_proj",))
    with pytest.raises(BadOption, match="cannot be adapted and trained whole"):
        list(train(session, load_data(data_file, session, 64), both))
    with pytest.raises(BadOption, match="'q_porj' is not in this model"):
        list(train(session, load_data(data_file, session, 64), Settings(modules_to_save=("q_porj",))))


def test_a_whole_model(session, data_file, tmp_path):
    transformers = pytest.importorskip("transformers")
    trained(session, data_file, tmp_path / "out", method="full")
    with open_session(tmp_path / "out", backend="cpu", exact=True) as tuned:
        ours = logits(tuned)
        assert tuned.template.source == session.template.source
    theirs = logits_of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").float().eval(), IDS)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.abs(ours - logits(session)).max() > 0.1


def test_peft_reads_a_prompt(tiny, session, data_file, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    finished = trained(session, data_file, tmp_path / "out", method="prompt", virtual_tokens=5)
    network = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "out")
    torch = pytest.importorskip("torch")
    from ondevice.train.batches import make_batch
    from ondevice.train.learner import Learner
    from ondevice.train.methods import make_method

    data = load_data(data_file, session, 64, validation=0)
    settings = Settings(method="prompt", virtual_tokens=5)
    params = {name: session.backend.array(v, "float32") for name, v in finished.parameters.items()}
    ours = Learner(make_method(session, settings)).losses(params, make_batch(data.train, [[0]], virtual=5))
    ids = torch.from_numpy(data.train[0].sequences[0].ids).long()
    learnt = torch.from_numpy(data.train[0].sequences[0].learnt[1:])
    with torch.no_grad():
        logprobs = network.float().eval()(input_ids=ids[None]).logits[0, -len(ids) : -1].log_softmax(-1)
    theirs = -logprobs.gather(-1, ids[1:, None])[:, 0][learnt]
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)
