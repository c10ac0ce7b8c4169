"""What inspect says of a model against transformers, peft, and arithmetic done by hand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ondevice.errors import BadFile, BadOption, OnDeviceError, Unsupported
from ondevice.models.families import family_for
from ondevice.registry import create_backend, families
from ondevice.runtime import memory
from ondevice.runtime.session import open_session
from ondevice.tools.inspect import routing
from ondevice.tools.inspect.anatomy import Anatomy, anatomy, component
from ondevice.tools.inspect.report import described, report
from ondevice.tools.inspect.sources import open_source
from ondevice.tools.inspect.text import check_template
from tests.models import twins
from tests.tiny_model import CHATML, write_tiny_model


def from_config(hf: dict) -> Anatomy:
    hf = json.loads(json.dumps(hf))
    family = family_for(hf, Path("config.json"))
    return anatomy(family, family.config(hf), hf, None)


@pytest.mark.parametrize("name", twins.TWINS)
def test_counts_are_those_of_transformers(name):
    twin = twins.make(name)
    found = from_config(twin.config.to_dict())
    corrections = sum(p.numel() for n, p in twin.named_parameters() if n.endswith("e_score_correction_bias"))
    counted = twin.num_parameters() - corrections  # which most families have as buffers, and nobody trains
    assert found.whole.parameters == counted
    assert sum(share.parameters for share in found.components()) == counted
    config = family_for(hf := twin.config.to_dict(), Path()).config(hf)
    assert all(re.search(r"heads of \d|convolution of", described(layer)) for layer in config.layers)
    named = dict(twin.named_parameters())
    assert found.whole.biases == sum(p.numel() for name, p in named.items() if name.endswith((".bias", "proj_bias")))


def test_what_the_published_shapes_of_llama_and_mixtures_give():
    """Counts that their papers and cards name."""
    llama = {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
    }  # fmt: skip
    assert from_config(llama).whole.parameters == 8_030_261_248
    qwen = {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 40960,
    }  # fmt: skip
    found = from_config(qwen).whole
    assert found.parameters == 30_532_122_624
    assert found.active == 30_532_122_624 - 48 * 120 * 3 * 2048 * 768  # 3.3 B: A3B


@pytest.mark.parametrize(
    ("shape", "count"),
    [((12, 768, 12, 1024), 124_439_808), ((48, 1600, 25, 1024), 1_557_611_200), ((96, 12288, 96, 2048), 175e9)],
)
def test_gpt_2_and_3(shape, count):
    """Radford et al. 2019 and Brown et al. 2020, table 2.1."""
    if "gpt2" not in families():
        pytest.skip("GPT-2 is not among the families")
    layers, width, heads, positions = shape
    hf = {"model_type": "gpt2", "n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": positions}
    found = from_config(hf | {"vocab_size": 50257}).whole.parameters
    assert found == count if count < 1e11 else found == pytest.approx(count, rel=0.01)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("embed", "embeddings"), ("positions", "embeddings"), ("head", "head"), ("norm", "norms"),
        ("norm.bias", "norms"), ("layers.3.attn.q", "attention q"), ("layers.3.attn.q.bias", "attention q"),
        ("layers.3.attn.q_norm", "norms"), ("layers.3.attn_post_norm", "norms"), ("layers.0.mlp.up", "feed-forward"),
        ("layers.0.moe.router", "router"), ("layers.0.moe.down", "experts"), ("layers.0.moe.down.bias", "experts"),
        ("layers.0.moe.shared.up", "shared experts"), ("layers.11.attn.qkv", "attention qkv"),
        ("layers.0.moe.shared_gate", "shared experts"), ("layers.0.moe.election", "router"),
        ("layers.0.moe.router.bias", "router"), ("layers.2.conv.taps", "convolution"),
        ("layers.2.delta.norm", "norms"), ("layers.2.latent.kv_down", "attention kv_down"),
        ("layers.2.delta.rate", "gated delta"),
    ],
)  # fmt: skip
def test_components(name, wanted):
    assert component(name) == wanted


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "phi3", "gpt2", "lfm2", "qwen3_5"])
def test_lora_trains_what_peft_says(name):
    peft = pytest.importorskip("peft")
    twin = twins.make(name)
    found = from_config(twin.config.to_dict()).lora(rank=5)
    adapted = peft.get_peft_model(twin, peft.LoraConfig(r=5, target_modules="all-linear"))
    assert found["all linear"] == adapted.get_nb_trainable_parameters()[0]
    attention = [n for n, p in adapted.named_parameters() if "lora" in n and ".linear_attn." not in n and "attn." in n]
    assert found["attention"] == sum(adapted.get_parameter(n).numel() for n in attention)
    assert set(found) == {"attention", "all linear"}


def test_experts_are_counted_apart():
    hf = twins.make("qwen3_moe").config.to_dict()
    found = from_config(hf)
    experts = next(share for share in found.components() if share.name == "experts")
    assert experts.parameters == 3 * 5 * 3 * 12 * 36  # layers, experts, matrices
    assert experts.active * 5 == experts.parameters * 2
    assert found.whole.active == found.whole.parameters - experts.parameters + experts.active
    thin = 3 * 5 * 4 * (12 + 36) * 3
    assert found.lora(4)["experts too"] - found.lora(4)["all linear"] == thin


# ---------------------------------------------------------------------------------------------- bytes


def folder_of(tmp_path: Path, name: str = "llama") -> Path:
    twins.make(name).save_pretrained(tmp_path / name)
    return tmp_path / name


def test_bytes_are_those_of_the_files(smollm2_gguf):
    with open_source(str(smollm2_gguf)) as source:
        found = anatomy(source.family, source.config, source.hf, source.checkpoint)
        assert found.whole.nbytes == source.checkpoint.nbytes
        assert found.whole.parameters == 134_515_008
        feed_forward = next(share for share in found.components() if share.name == "feed-forward")
        assert feed_forward.formats == ("Q4_1",) and feed_forward.bits == 5.0  # 20 bytes for 32 numbers
        assert source.licence() == "apache-2.0"
        assert sum(share.nbytes for share in found.layers()) < found.whole.nbytes


@pytest.mark.parametrize("name", ["qwen3_moe", "phi3", "gemma3", "granitemoe"])
def test_bytes_of_folders(name, tmp_path):
    with open_source(str(folder_of(tmp_path, name))) as source:
        found = anatomy(source.family, source.config, source.hf, source.checkpoint)
        assert found.whole.nbytes == source.checkpoint.nbytes == 4 * found.whole.parameters


def test_a_config_alone_promises_what_the_files_keep(tmp_path):
    folder = folder_of(tmp_path)
    with open_source(str(folder)) as source:
        full = anatomy(source.family, source.config, source.hf, source.checkpoint)
    for place in (folder / "config.json", folder):
        (folder / "model.safetensors").unlink(missing_ok=True)
        with open_source(str(place)) as source:
            assert source.checkpoint is None and source.path == folder / "config.json"
            assert anatomy(source.family, source.config, source.hf, None) == full


def test_the_config_of_a_model_that_sees(tmp_path):
    """Alone: of the part that writes text, kept as the whole is."""
    text = twins.make("qwen3").config.to_dict()
    text |= {"model_type": "qwen3_vl_text", "tie_word_embeddings": True}
    seeing = {"model_type": "qwen3_vl", "text_config": text, "dtype": "float32", "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(seeing))
    with open_source(str(tmp_path)) as source:
        found = anatomy(source.family, source.config, source.hf, None)
    apart = twins.make("qwen3", tie_word_embeddings=False).num_parameters()
    assert (found.whole.parameters, found.whole.nbytes) == (apart, 4 * apart)


def test_a_config_that_speaks_of_quantization():
    hf = twins.make("llama", hidden_size=96, intermediate_size=128, head_dim=16).config.to_dict() | {
        "dtype": "float16", "quantization": {"bits": 4, "group_size": 32}
    }  # fmt: skip
    found = from_config(hf)
    for share in found.components():
        assert share.bits == pytest.approx(16 if share.name == "norms" else 5)  # 4, and 2 x 16 for 32 numbers


def test_a_repo_that_is_not_here_gives_its_config(monkeypatch, tmp_path):
    """Nothing but config.json is asked of the Hub."""
    asked = []
    folder = write_tiny_model(tmp_path / "tiny")

    def download(repo, file, revision=None, local_files_only=False):
        from huggingface_hub.errors import LocalEntryNotFoundError

        if local_files_only:
            raise LocalEntryNotFoundError("not here")
        asked.append((repo, file, revision))
        return str(folder / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("ondevice.hub.repos._cached", lambda *_: None)
    monkeypatch.setattr("ondevice.hub.repos.reachable", lambda: True)
    with open_source("someone/tiny@v1") as source:
        assert source.checkpoint is None and source.config.width == 32
    assert asked == [("someone/tiny", "config.json", "v1")]


# ---------------------------------------------------------------------------------------------- the report


def facts(model: str | Path, *options: str) -> dict:
    done = ondevice("inspect", model, "--json", "--backend", "cpu", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def ondevice(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "ondevice", *map(str, arguments)], capture_output=True, text=True)


def test_the_report_of_a_tiny_model(tmp_path):
    folder = write_tiny_model(tmp_path / "tiny")
    (folder / "README.md").write_text("---\ntags:\n- tiny\nlicense: mit\n---\n# Tiny\nlicense: none\n")
    said = facts(folder, "--context", "100", "--batch", "3", "--rank", "4", "--plot", tmp_path / "a.png")
    assert said["licence"] == "mit" and said["family"] == "llama" and said["weights_here"]
    assert said["kv_bytes_per_token"] == 2 * 2 * (8 + 16) * 2  # float16; values of whole vectors
    assert said["memory"]["cache"] == 3 * 112 * said["kv_bytes_per_token"]  # seven panels of sixteen
    assert said["lora"] == {
        "rank": 4, "attention": 2 * 4 * (64 + 48 + 48 + 64),
        "all linear": 2 * 4 * (64 + 48 + 48 + 64 + 3 * 80),
    }  # fmt: skip
    assert said["layers"][1]["is"] == "4 heads of 8 (2 kv), MLP of 48"
    assert said["tokens"]["roles"]["eos"][1] == "<|im_end|>"
    assert {check["name"]: check["ok"] for check in said["template"]} == {
        "renders a question": True, "opens an answer": True, "takes several turns": True,
        "takes a system message": True, "takes tools": None, "an answer ends in a stop token": True,
    }  # fmt: skip
    assert Image.open(tmp_path / "a.png").size[0] > 300


def test_what_people_see(tmp_path):
    done = ondevice("inspect", write_tiny_model(tmp_path / "tiny"))
    assert done.returncode == 0, done.stderr
    for words in ("licence     not said", "parameters  22,", "feed-forward", "0-1 ", "memory ", "template    ok"):
        assert words in done.stdout, words


@pytest.mark.parametrize(
    ("template", "wrong"),
    [
        (CHATML.replace("<|im_end|>", ""), "an answer ends in a stop token"),
        (CHATML.replace("<|im_end|>", "<|im_start|>"), "an answer ends in a stop token"),
        (CHATML.replace("m['content']", "''"), "renders a question"),
        ("{% if messages|length > 1 %}{{ raise_exception('one only') }}{% endif %}{{ messages[0].content }}",
         "takes several turns"),
        ("{% for %}", "renders a question"),
    ],
)  # fmt: skip
def test_a_template_that_is_wrong_is_said(tmp_path, template, wrong):
    with open_source(str(write_tiny_model(tmp_path / "tiny", template))) as source:
        tokenizer = source.tokenizer()
        checks = {check.name: check.ok for check in check_template(tokenizer, tokenizer.eos_ids)}
    assert checks[wrong] is False


def test_what_lies_beside_a_gguf_is_not_its_own(tmp_path, smollm2_gguf):
    (tmp_path / "model.gguf").symlink_to(smollm2_gguf)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    with open_source(str(tmp_path / "model.gguf")) as source:
        assert source.eos() is None


def test_a_model_that_does_not_fit_is_told_what_would(tmp_path, monkeypatch):
    with open_source(str(write_tiny_model(tmp_path / "tiny"))) as source:
        ops = create_backend("cpu")
        monkeypatch.setattr(memory, "used_bytes", lambda: 0)
        whole = report(source, ops, None, 1, 8, None)
        assert not whole.fitting and whole.plan.context == 4096
        monkeypatch.setattr("ondevice.tools.inspect.report.memory_bytes", lambda: whole.plan.needed - 1)
        tight = report(source, ops, None, 1, 8, None)
        assert tight.fitting[0][0] == "--context 3840" and tight.fitting[0][1].needed < whole.plan.needed


def test_what_cannot_be_inspected(tmp_path):
    folder = write_tiny_model(tmp_path / "tiny")
    with open_source(str(folder)) as source, pytest.raises(BadOption, match="made for 4096"):
        report(source, create_backend("cpu"), 5000, 1, 8, None)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 40}))
    with open_source(str(folder)) as source, pytest.raises(BadFile, match="do not fit its config"):
        report(source, create_backend("cpu"), None, 1, 8, None)
    for text, kind in (("[]", BadFile), ("{", BadFile), ('{"model_type": "lama"}', Unsupported)):
        config.write_text(text)
        with pytest.raises(kind):
            open_source(str(config))
    with pytest.raises(BadFile, match="lists tensors"):
        (tmp_path / "model.safetensors.index.json").write_text("{}")
        open_source(str(tmp_path / "model.safetensors.index.json"))
    done = ondevice("inspect", config, "--plot", tmp_path / "picture.txt")
    assert done.returncode == 2 and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------- the router


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A tiny mixture of experts with a tokenizer, and its twin."""
    folder = write_tiny_model(tmp_path_factory.mktemp("mixture") / "moe")
    twin = twins.make("qwen3_moe", vocab_size=106, num_experts=8)
    twin.save_pretrained(folder)
    return folder, twin


TEXT = "the end and the sand on the hand in the tin, and then again: " * 3


def test_the_router_does_what_transformers_does(mixture):
    folder, twin = mixture
    with open_session(folder, backend="cpu", exact=True) as session:
        *events, found = routing.routed(session, TEXT)
        ids = session.tokenizer.encode(TEXT)
        assert session.decoder.listener is None
    import torch

    size = session.config.context
    assert found.tokens == len(ids) > size and [e.done for e in events][-1] == len(ids)
    windows = [torch.tensor([ids[at : at + size]]) for at in range(0, len(ids), size)]
    with torch.no_grad():
        outputs = [twin(window, output_router_logits=True).router_logits for window in windows]
    for layer in found.layers:
        logits = torch.cat([router[layer.layer].reshape(-1, 8) for router in outputs])
        if torch.allclose(logits.sum(-1), torch.ones(len(logits))):  # some versions give what softmax made of them
            logits = logits.log()
        chances = logits.softmax(-1).double()
        counts = np.bincount(chances.topk(2).indices.ravel().numpy(), minlength=8)
        np.testing.assert_array_equal(layer.counts, counts)
        assert layer.doubt == pytest.approx(float(-(chances * chances.log()).sum(-1).mean()) / np.log(8), abs=1e-5)
        shares = counts[counts > 0] / counts.sum()
        assert layer.entropy == pytest.approx(-(shares * np.log(shares)).sum() / np.log(8))
        assert layer.load.mean() == pytest.approx(1) and layer.dead == tuple(np.flatnonzero(counts == 0))


def test_the_router_on_the_command_line(mixture, tmp_path):
    done = ondevice("inspect", mixture[0], "--router", "the end", "--plot", tmp_path / "r.png", "--json")
    said = json.loads(done.stdout)
    assert [layer["layer"] for layer in said["layers"]] == [0, 1, 2] and (tmp_path / "r.png").stat().st_size > 1000
    assert all(sum(layer["counts"]) == 2 * said["tokens"] for layer in said["layers"])
    assert "busiest" in ondevice("inspect", mixture[0], "--router", "the end").stdout


def test_a_router_that_is_not_there(tmp_path, mixture):
    dense = open_session(write_tiny_model(tmp_path / "tiny"), backend="cpu")
    with dense as session, pytest.raises(Unsupported, match="no experts"):
        list(routing.routed(session, "the end"))
    with open_session(mixture[0], backend="cpu") as session, pytest.raises(OnDeviceError, match="no tokens"):
        list(routing.routed(session, ""))
