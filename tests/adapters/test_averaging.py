"""The mean of adapters: of their factors, and of what they change, held to what several attached at once do."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from ondevice.adapters import Modules, averaged, read_adapter, stacked
from ondevice.backends.base import Step
from ondevice.cli.average import command
from ondevice.errors import BadOption

from .conftest import IDS

ALL = {"target_modules": "all-linear"}


def logits(session) -> np.ndarray:
    ops = session.backend
    return np.array(ops.numpy(session.decoder(ops.array(IDS), Step.whole(*IDS.shape))))


def run(*arguments: object) -> object:
    return CliRunner().invoke(command, [str(a) for a in arguments])


def test_factors_are_averaged(lora, model, tmp_path):
    (_, one), (_, two) = lora("llama", 1, **ALL), lora("llama", 2, **ALL)
    done = run(model("llama")[1], f"{one}:1", f"{two}:3", tmp_path / "mean", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["adapters"] == {str(one): 0.25, str(two): 0.75}
    files = [load_file(folder / "adapter_model.safetensors") for folder in (one, two, tmp_path / "mean")]
    assert files[2].keys() == files[0].keys()
    for name, mean in files[2].items():
        np.testing.assert_allclose(mean, 0.25 * files[0][name] + 0.75 * files[1][name], rtol=1e-6, atol=1e-7)


def test_stacked_is_what_both_do_at_once(lora, model, opened, created, tmp_path):
    """Other ranks, other targets, an embedding and a head among them."""
    (_, one), (_, two) = lora("llama", 1, **ALL), lora("llama", 2, target_modules=["q_proj", "embed_tokens"], r=3)
    done = run(model("llama")[1], f"{one}:2", f"{two}:6", tmp_path / "mean", "--exact")
    assert done.exit_code == 0, done.output
    session = opened("llama", created("cpu"))
    session.adapt([(one, 0.25), (two, 0.75)])
    want = logits(session)
    session.adapt([(tmp_path / "mean", 1.0)])
    np.testing.assert_allclose(logits(session), want, atol=2e-5 * np.abs(want).max())


def test_differences_are_all_named(lora, model, opened, created):
    session = opened("llama", created("cpu"))
    modules = Modules(session.family, session.config)
    (_, one), (_, two) = lora("llama", 1, **ALL), lora("llama", 2, target_modules=["q_proj", "embed_tokens"], r=3)
    shares = [(read_adapter(folder, modules), 1.0) for folder in (one, two)]
    with pytest.raises(BadOption) as caught:
        averaged(shares)
    assert "attn.q: rank" in caught.value.message and "more" in caught.value.message and "--exact" in caught.value.hint


def test_what_cannot_be_averaged(lora, model, opened, created, tmp_path):
    session = opened("llama", created("cpu"))
    modules = Modules(session.family, session.config)
    (_, plain), (_, dora) = lora("llama", 1, **ALL), lora("llama", 5, **ALL, use_dora=True)
    plain, dora = read_adapter(plain, modules), read_adapter(dora, modules)
    for shares in ([(plain, 1.0)], [(plain, 0.0), (plain, 0.0)], [(plain, 2.0), (plain, -1.0)]):
        with pytest.raises(BadOption):
            averaged(shares)
    with pytest.raises(BadOption, match="DoRA"):
        stacked([(plain, 1.0), (dora, 1.0)])
    assert averaged([(dora, 1.0), (dora, 1.0)]).dora
    (tmp_path / "there").mkdir()
    done = run(model("llama")[1], lora("llama", 1, **ALL)[1], lora("llama", 2, **ALL)[1], tmp_path / "there")
    assert "exists already" in str(done.exception)
