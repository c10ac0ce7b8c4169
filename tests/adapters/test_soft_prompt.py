"""Soft prompts: what peft says behind one is what we say, in every way that text goes through a model."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from ondevice.adapters import Adapter, Modules, averaged, read_adapter, write_adapter
from ondevice.errors import BadFile, BadOption, OnDeviceError, Unsupported
from ondevice.registry import probe_backends
from ondevice.runtime.chat import Conversation
from ondevice.runtime.engine import GenerateOptions, Token
from ondevice.runtime.session import open_session
from ondevice.tensors import dense
from ondevice.tools.evaluate import batch
from ondevice.tools.evaluate.text import Evaluation, evaluate
from tests.tiny_model import write_tiny_model

TOKENS = 5
IDS = [3, 17, 9, 40, 22, 8, 31]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory):
    """A model of transformers behind a soft prompt that peft has made, and its folder."""
    torch = pytest.importorskip("torch")
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, prompt_tuning_init="RANDOM")
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        model.prompt_encoder.default.embedding.weight.copy_(
            torch.from_numpy(np.random.default_rng(0).standard_normal((TOKENS, 32)).astype(np.float32))
        )
    folder = tmp_path_factory.mktemp("prompt")
    model.save_pretrained(folder)
    return model, folder


def says(model, ids) -> np.ndarray:
    """peft's logits behind each of the ids: [T, V]"""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :].numpy()


@pytest.fixture(params=["reference", "cpu", "cuda", "mlx"])
def session(request, base, adapted):
    if not probe_backends()[request.param].ready:
        pytest.skip(f"{request.param} is not here")
    with open_session(base, backend=request.param, exact=True, context=64) as opened:
        opened.adapt([(adapted[1], 1.0)])
        yield opened


def greedy(model, ids, count) -> list[int]:
    said = list(ids)
    for _ in range(count):
        said.append(int(says(model, said)[-1].argmax()))
    return said[len(ids) :]


def test_the_logits_of_peft(session, adapted):
    logits, prefilled = session.engine.prefill([*session.decoder.front, *IDS])
    np.testing.assert_allclose(session.backend.numpy(logits)[0], says(adapted[0], IDS)[-1], atol=1e-4)
    assert prefilled.tokens == TOKENS + len(IDS)


def test_answers_go_on_as_peft_does(session, adapted):
    """The second shares its beginning with the first; without the adapter something else is said."""
    for ids in (IDS, [*IDS[:4], 12]):
        events = session.engine.generate(ids, GenerateOptions(max_tokens=6))
        assert [e.id for e in events if isinstance(e, Token)] == greedy(adapted[0], ids, 6)
    alone = session.engine.prefill([*session.decoder.front, *IDS])[0]
    behind = np.array(session.backend.numpy(alone))
    session.adapt([])
    assert np.abs(session.backend.numpy(session.engine.prefill(IDS)[0]) - behind).max() > 0.1


def test_many_at_once(session, adapted):
    prompts = [IDS, IDS[:3]]
    answers = batch.generate(session.decoder, prompts, 4, frozenset())
    assert answers == [greedy(adapted[0], prompt, 4) for prompt in prompts]
    (_, score), *_ = batch.score(session.decoder, [(IDS[:4], IDS[4:])])
    logprobs = says(adapted[0], IDS).astype(np.float64)
    logprobs -= np.log(np.exp(logprobs).sum(-1, keepdims=True))
    assert score.logprob == pytest.approx(sum(logprobs[i - 1, IDS[i]] for i in range(4, len(IDS))), abs=1e-3)


def test_a_text(session, adapted):
    text = "the cat and the dog went to the sea"
    *_, found = evaluate(session, text, context=8)
    assert isinstance(found, Evaluation)
    losses = []
    for window in found.windows:
        logits = says(adapted[0], window).astype(np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        losses += [-logits[i, window[i + 1]] for i in range(len(window) - 1)]
    np.testing.assert_allclose(found.own.losses, losses, atol=1e-4)


def test_written_again_it_is_the_same(base, adapted, tmp_path):
    with open_session(base, backend="cpu") as opened:
        modules = Modules(opened.family, opened.config)
    write_adapter(tmp_path / "again", read_adapter(adapted[1], modules), modules)
    names = ("adapter_config.json", "adapter_model.safetensors")
    import peft
    import transformers

    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == list(names)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    again = peft.PeftModel.from_pretrained(model, tmp_path / "again").eval()
    assert np.array_equal(says(again, IDS), says(adapted[0], IDS))


def test_what_a_soft_prompt_cannot_do(base, adapted, tmp_path):
    folder = adapted[1]
    with open_session(base, backend="cpu") as opened:
        modules = Modules(opened.family, opened.config)
        read = read_adapter(folder, modules)
        with pytest.raises(BadOption, match="Two soft prompts"):
            opened.adapt([(folder, 1.0), (folder, 1.0)])
        with pytest.raises(BadOption, match=r"count 0\.5 times"):
            opened.adapt([(folder, 0.5)])
        assert not opened.attached and opened.decoder.soft is None
    with pytest.raises(Unsupported, match="averaged"):
        averaged([(read, 1.0), (read, 1.0)])
    with pytest.raises(Unsupported, match="mlx-lm"):
        write_adapter(tmp_path / "mlx", read, modules, "mlx")
    narrow = shutil.copytree(folder, tmp_path / "narrow")
    for tensors, said in (
        ({"prompt_embeddings": np.ones((5, 31), np.float32)}, r"\[5, 31\], not \[tokens, 32\]"),
        ({"other": np.ones((5, 32), np.float32)}, "holds other"),
    ):
        save_file(tensors, narrow / "adapter_model.safetensors")
        with open_session(base, backend="cpu") as opened, pytest.raises(BadFile, match=said):
            opened.adapt([(narrow, 1.0)])


def test_it_takes_its_place_in_the_context(base, adapted):
    with open_session(base, backend="cpu", context=10) as opened:
        opened.adapt([(adapted[1], 1.0)])
        with pytest.raises(OnDeviceError, match="12 tokens and the context holds 10"):
            list(opened.engine.generate(IDS, GenerateOptions(max_tokens=1)))


def test_a_conversation_makes_room_for_it(base, tmp_path):
    """Old exchanges are hidden as soon as what is left of the context is full, not when the engine refuses."""
    with open_session(base, backend="cpu", context=128) as opened:
        modules = Modules(opened.family, opened.config)
        write_adapter(tmp_path / "soft", Adapter({}, prompt=dense(np.zeros((40, 32), np.float32))), modules)
        opened.adapt([(tmp_path / "soft", 1.0)])
        talk = Conversation(opened, GenerateOptions(max_tokens=4, stop_ids=frozenset()))
        for _ in range(4):
            assert list(talk.send("the and in"))[-1].reason == "length"
        assert talk.hidden
