"""Every kind of layer learns as transformers' does: all weights trained, the same losses; and LoRA on experts."""

from __future__ import annotations

import numpy as np
import pytest

from ondevice.backends.base import Step
from ondevice.registry import probe_backends
from ondevice.runtime.session import open_session
from ondevice.testing.family import logits_of
from ondevice.train import Data, Encoded, Example, Settings, StepDone, train

from .oracle import peft_losses

KINDS = (
    "llama-biases", "gemma2", "gemma3-full", "granite", "mistral", "phi3", "cohere-biases", "gpt2", "lfm2", "qwen3_5",
    "qwen3_moe", "qwen2_moe", "lfm2_moe", "llama4-experts", "hunyuan", "cohere-norms",
)  # fmt: skip


@pytest.fixture(scope="module")
def twin_folder(tmp_path_factory):
    pytest.importorskip("transformers")
    from tests.models import twins

    def make(name):
        folder = tmp_path_factory.mktemp("twins") / name
        twins.make(name).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def ids() -> Data:
    """Sequences of several lengths, the second half of each learnt."""
    draw = np.random.default_rng(1)
    examples = []
    for n in (21, 9, 14, 17):
        learnt = np.arange(n) >= n // 2
        examples.append(Example((Encoded(draw.integers(0, 61, n).astype(np.int32), learnt),), f"example {n}"))
    return Data(examples)


def losses(folder, data, settings, backend="cpu") -> list[float]:
    with open_session(folder, backend=backend, exact=True) as session:
        return [e.loss for e in train(session, data, settings) if isinstance(e, StepDone)]


@pytest.mark.parametrize("kind", KINDS)
def test_all_weights(twin_folder, ids, kind):
    # the twin of delta rules has gradients so steep that a weight which AdamW moves the other way tells in the loss
    rate = 1e-4 if kind == "qwen3_5" else 3e-3
    settings = Settings(method="full", steps=4, learning_rate=rate, batch_size=4)
    folder = twin_folder(kind)
    ours = losses(folder, ids, settings)
    assert ours[-1] < ours[0] - 0.02
    np.testing.assert_allclose(ours, list(peft_losses(folder, None, ids, settings)), atol=1e-3)


@pytest.mark.parametrize("kind", ["granite", "granite4", "gemma3-full", "gpt2"])
def test_a_prompt_of_embeddings_that_are_scaled_or_have_positions(twin_folder, ids, tmp_path, kind):
    """What of an embedding is a token's own, and what every place's, differs: trained and used as peft does."""
    settings = Settings(method="prompt", virtual_tokens=3, steps=4, learning_rate=3e-2, batch_size=4)
    folder = twin_folder(kind)
    with open_session(folder, backend="cpu", exact=True) as session:
        list(train(session, ids, Settings(**settings.as_dict() | {"steps": 0}), tmp_path / "begin"))
        ours = [e.loss for e in train(session, ids, settings, tmp_path / "end") if isinstance(e, StepDone)]
        assert ours[-1] < ours[0] - 0.02
        asked = ids.train[0].sequences[0].ids
        session.adapt([(tmp_path / "end", 1.0)])
        row = session.backend.array(np.array([[*session.decoder.front, *asked]], np.int32))
        said = session.backend.numpy(session.decoder(row, Step.whole(*row.shape)))[:, -len(asked) :]
    np.testing.assert_allclose(ours, list(peft_losses(folder, tmp_path / "begin", ids, settings)), atol=1e-3)
    network = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(folder)
    network = pytest.importorskip("peft").PeftModel.from_pretrained(network, tmp_path / "end").eval()
    np.testing.assert_allclose(said, logits_of(network, asked[None])[:, -len(asked) :], atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3_moe", "lfm2"])
def test_a_trained_model_loads_in_transformers(twin_folder, ids, tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    settings = Settings(method="full", steps=2, learning_rate=3e-3, batch_size=4)
    with open_session(twin_folder(kind), backend="cpu", exact=True) as session:
        list(train(session, ids, settings, tmp_path / "out"))
    asked = np.arange(5, 17, dtype=np.int32)[None]
    with open_session(tmp_path / "out", backend="cpu", exact=True) as session:
        ours = session.backend.numpy(session.decoder(session.backend.array(asked), Step.whole(1, 12)))
    theirs = logits_of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").float().eval(), asked)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "cuda", "mlx"])
def test_experts_learn_alike_everywhere(twin_folder, ids, backend):
    if not probe_backends()[backend].ready:
        pytest.skip(f"{backend} is not here")
    settings = Settings(steps=4, learning_rate=1e-2, batch_size=4, rank=3)
    folder = twin_folder("qwen3_moe")
    ours = losses(folder, ids, settings)
    assert ours[-1] < ours[0] - 0.02
    np.testing.assert_allclose(losses(folder, ids, settings, backend), ours, atol=1e-4)


def test_a_quantized_base_is_trained_through(ids, tmp_path):
    """Gradients pass 4-bit weights as they pass the same numbers written out."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    from ondevice.testing.family import TINY, randomise
    from ondevice.tools.quantize import Options, quantize

    wide = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
    twin = randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY | wide)))
    twin.save_pretrained(tmp_path / "twin")
    quantize(tmp_path / "twin", tmp_path / "few", Options(method="rtn", bits=4, group_size=32))
    settings = Settings(steps=6, learning_rate=1e-2, batch_size=4, rank=4)
    with open_session(tmp_path / "few", backend="cpu", exact=True) as session:
        assert any(tensor.quantized for tensor in map(session.parameters.__getitem__, session.parameters))
        list(train(session, ids, Settings(**settings.as_dict() | {"steps": 0}), tmp_path / "begin"))
        ours = [e.loss for e in train(session, ids, settings) if isinstance(e, StepDone)]
        ops = session.backend
        names = {name: session.family.names.spell(name) for name in session.parameters}
        state = {spelled: ops.numpy(ops.dequantize(session.weights[name])) for name, spelled in names.items()}
    torch = pytest.importorskip("torch")
    twin.load_state_dict({name: torch.from_numpy(values.copy()) for name, values in state.items()}, strict=False)
    twin.save_pretrained(tmp_path / "written out")
    assert peft
    theirs = list(peft_losses(tmp_path / "written out", tmp_path / "begin", ids, settings))
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
