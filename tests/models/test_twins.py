"""Every family beside transformers, on every backend that is ready: at once, token by token, in pieces, ragged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ondevice.backends.base import AttentionSpec, Step
from ondevice.backends.reference import create as create_reference
from ondevice.models.config import ModelConfig, MoEConfig, Sharpness
from ondevice.models.decoder import Decoder
from ondevice.testing.family import check_decoder, check_family, logits_of, open_decoder
from tests.models import twins


@pytest.mark.parametrize(("backend", "name"), twins.PAIRS, indirect=["backend"])
def test_logits_are_those_of_transformers(name, backend, twin_folder):
    twin, folder = twin_folder(name)
    check_family(folder, twin, backend)


@pytest.mark.parametrize("name", twins.TWINS)
def test_decoding_is_recorded_whole_on_cpu(name, twin_folder, created):
    """No operation of a family falls out of the plan that a token is replayed from."""
    cpu = created("cpu")
    if "compile" not in cpu.features:
        pytest.skip("there are no native kernels here")
    decoder = open_decoder(twin_folder(name)[1], cpu, 4)
    cache = decoder.new_cache(1, 4)
    step = Step(*(np.array([n], np.int32) for n in (0, 1, 0)), cache=cache)
    cpu.compile(decoder, [cache, decoder.weights])(cpu.array(np.array([[1]], np.int32)), step)
    assert cpu.compiled.startswith("a plan of"), cpu.compiled


@pytest.mark.parametrize("name", twins.TWINS)
def test_older_configs_mean_the_same(name, twin_folder, tmp_path):
    twin, folder = twin_folder(name)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = twins.published(json.loads((folder / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_family(tmp_path, twin)


def attention(**fields: Any):
    """A change of every layer's attention."""
    return lambda c: replace(c, layers=[replace(x, mixer=replace(x.mixer, **fields)) for x in c.layers])


def spec(**fields: Any):
    """A change of how scores are made, in layers that have a window."""

    def change(c: ModelConfig) -> ModelConfig:
        layers = [
            replace(x, mixer=replace(x.mixer, spec=replace(x.mixer.spec, **fields))) if x.mixer.spec.window else x
            for x in c.layers
        ]
        return replace(c, layers=layers)

    return change


def experts(**fields: Any):
    def change(c: ModelConfig) -> ModelConfig:
        layers = [
            replace(x, feed_forward=replace(x.feed_forward, **fields)) if isinstance(x.feed_forward, MoEConfig) else x
            for x in c.layers
        ]
        return replace(c, layers=layers)

    return change


def layers(**fields: Any):
    return lambda c: replace(c, layers=[replace(x, **fields) for x in c.layers])


def rope(name: str, **fields: Any):
    return lambda c: replace(c, ropes={**c.ropes, name: replace(c.ropes[name], **fields)})


MUTATIONS = {
    "llama another base": ("llama", rope("main", base=20000.0)),
    "llama interleaved": ("llama", rope("main", interleaved=True)),
    "llama without rope": ("llama", attention(rope=None)),
    "llama another epsilon": ("llama-defaults", lambda c: replace(c, norm_eps=1e-6)),
    "llama gains from one": ("llama", lambda c: replace(c, norm_offset=1.0)),
    "llama without llama3": ("llama-rope3", rope("main", scaling={})),
    "llama3 another factor": ("llama-rope3", rope("main", scaling=twins.LLAMA3 | {"factor": 7.0})),
    "llama3 another blend": ("llama-rope3", rope("main", scaling=twins.LLAMA3 | {"high_freq_factor": 5.0})),
    "llama without linear": ("llama-linear", rope("main", scaling={})),
    "qwen3 without q/k norm": ("qwen3", attention(qk_norm=None)),
    "qwen3 without a window": ("qwen3-window", spec(window=None)),
    "qwen3 a window too long": ("qwen3-window", spec(window=6)),
    "gemma3 a window too short": ("gemma3", spec(window=4)),
    "gemma3 one window for all": ("gemma3", lambda c: replace(c, layers=[c.layers[0]] * len(c.layers))),
    "gemma3 one rope for all": ("gemma3", attention(rope="main")),
    "gemma3 another local base": ("gemma3-full", rope("local", base=10000.0)),
    "gemma3 without linear": ("gemma3-full", rope("main", scaling={})),
    "gemma3 linear everywhere": ("gemma3-full", rope("local", scaling={"rope_type": "linear", "factor": 8.0})),
    "gemma3 embedding as it is": ("gemma3", lambda c: replace(c, embed_scale=1.0)),
    "gemma3 gains as they are": ("gemma3", lambda c: replace(c, norm_offset=0.0)),
    "gemma3 scores by head": ("gemma3", spec(scale=8**-0.5)),
    "gemma3 logits uncapped": ("gemma3-full", lambda c: replace(c, logit_softcap=None)),
    "gemma3 without sandwich": (
        "gemma3",
        lambda c: replace(c, layers=[replace(x, post_norms=False) for x in c.layers]),
    ),
    "gemma3 another gelu": (
        "gemma3",
        lambda c: replace(c, layers=[replace(x, feed_forward=replace(x.feed_forward, act="gelu")) for x in c.layers]),
    ),
    "experts renormalised": ("qwen3_moe-sums", lambda c: experts(rule=ruled(c, renormalise=True))(c)),
    "experts not renormalised": ("qwen3_moe", lambda c: experts(rule=ruled(c, renormalise=False))(c)),
    "an expert without its shared one": ("qwen2_moe", experts(shared=None)),
    "a shared expert without its gate": ("qwen2_moe", experts(shared_gate=False)),
    "an up without its clamp": ("gpt_oss", experts(up_act="tanh")),
    "an up without its one": ("gpt_oss", experts(up_offset=0.0)),
    "attention without sinks": ("gpt_oss", attention(sinks=False)),
    "yarn without its ramp": ("mistral-full", rope("main", scaling={"rope_type": "linear", "factor": 4.0})),
    "yarn of another factor": ("mistral-full", rope("main", scaling=twins.YARN | {"factor": 4.5})),
    "yarn truncated": ("gpt_oss-yarn", rope("main", scaling=twins.WHOLE_YARN | {"truncate": True})),
    "norms without their bias": ("stablelm", lambda c: replace(c, norm="rms")),
    "a block in series": ("gpt_neox", layers(parallel=False)),
    "a block side by side": ("gpt_neox-serial", layers(parallel=True)),
    "what is added, unscaled": ("granite", layers(residual_scale=1.0)),
    "logits unscaled": ("granite", lambda c: replace(c, logit_scale=1.0)),
    "positions everywhere": ("smollm3", attention(rope="main")),
    "pairs in halves": ("cohere", rope("main", interleaved=False)),
    "all of a head turns": ("glm4", rope("main", dim=8)),
    "experts elected without bias": ("deepseek_v3", experts(election=False)),
    "experts of all groups": ("deepseek_v3", lambda c: experts(rule=ruled(c, top_groups=4))(c)),
    "gates unscaled": ("deepseek_v2-yarn", lambda c: experts(rule=ruled(c, scale=1.0))(c)),
    "latent scores unsharpened": ("deepseek_v2-yarn", attention(spec=AttentionSpec(10**-0.5))),
    "gates of all rivals": ("phimoe", lambda c: experts(rule=ruled(c, jitter=100.0))(c)),
    "queries of one sharpness": ("ministral3", attention(sharpness=None)),
    "sharper a token early": ("ministral3", attention(sharpness=Sharpness(4, 0.3, ahead=1))),
    "chunks without end": ("llama4-experts", lambda c: attention(spec=AttentionSpec(8**-0.5))(c)),
    "keys as long as they are": ("llama4-plain", attention(qk_norm="bare")),
    "an expert fewer": ("qwen3_moe", experts(per_token=1)),
}


def ruled(config: ModelConfig, **fields: Any):
    return replace(config.layers[-1].feed_forward.rule, **fields)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_twins_notice(mutation, twin_folder):
    """What would go wrong with a fact of a family got wrong does go wrong: the comparison is sharp enough."""
    name, change = MUTATIONS[mutation]
    twin, folder = twin_folder(name)
    ops = create_reference()
    decoder = open_decoder(folder, ops)
    mutant = Decoder(change(decoder.config), ops, decoder.weights)
    ids = np.random.default_rng(0).integers(0, decoder.config.vocab, (2, 13)).astype(np.int32)
    with pytest.raises(AssertionError, match="allowed"):
        check_decoder(mutant, ids, logits_of(twin, ids))


@pytest.mark.parametrize("name", ["llama", "llama-rope3", "llama-linear"])
def test_rotary_frequencies_are_those_of_transformers(name, twin_folder):
    twin, folder = twin_folder(name)
    freqs, scale = open_decoder(folder, create_reference()).config.ropes["main"].frequencies()
    rotary = twin.model.rotary_emb
    assert scale == rotary.attention_scaling
    np.testing.assert_allclose(freqs, rotary.inv_freq.numpy(), rtol=3e-7)
