"""What the machine has, and what is refused before it starts to swap."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ondevice import machine
from ondevice.checkpoint import open_checkpoint
from ondevice.errors import OnDeviceError
from ondevice.models.config import ModelConfig
from ondevice.models.families import family_of
from ondevice.models.parameters import Parameters, expected
from ondevice.registry import create_backend, families, probe_backends
from ondevice.runtime import memory
from ondevice.runtime.session import open_session
from ondevice.tensors import Dense, blank
from tests.tiny_model import write_tiny_model


def test_the_peak_grows_with_what_is_held():
    before = machine.peak_memory_bytes()
    held = np.ones(300_000_000, np.uint8)
    assert machine.peak_memory_bytes() - before > 100_000_000 or machine.peak_memory_bytes() > 300_000_000
    assert held.sum() == 300_000_000


def test_the_machine_has_some_memory():
    assert machine.memory_bytes() is None or machine.memory_bytes() > 1 << 28


HF = {
    "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500,
    "intermediate_size": 384, "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip


def planner(dtype: str = "float32", **options) -> memory.Planner:
    config = ModelConfig.llama_like(HF)
    tensors = {name: blank(shape, Dense(dtype)) for name, shape in expected(config).items()}
    return memory.Planner(config, tensors, create_backend("cpu", **options))


def test_a_plan_adds_up():
    plan = planner().plan(context=1000, batch=2)
    matrices = [shape for shape in expected(ModelConfig.llama_like(HF)).values() if len(shape) > 1]
    vectors = [shape for shape in expected(ModelConfig.llama_like(HF)).values() if len(shape) == 1]
    assert plan.mapped == sum(4 * rows * columns for rows, columns in matrices) and plan.idle == 0
    assert plan.weights == sum(4 * size for (size,) in vectors)
    assert plan.cache == 2 * 3 * 2 * (64 + 64) * 1008 * 2  # whole panels of float16
    assert plan.total == plan.weights + plan.mapped + plan.cache + plan.activations + plan.base == plan.needed
    assert planner(exact=True).plan(1000, 2).cache == 2 * plan.cache


@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda", "mlx"])
def test_every_backend_can_be_planned_for(backend):
    if not probe_backends()[backend].ready:
        pytest.skip(f"{backend} is not ready here")
    made = planner()
    plan = memory.Planner(made.config, made.tensors, create_backend(backend, exact=True)).plan(1024)
    assert plan.cache == 3 * 2 * 128 * 1024 * 4
    assert plan.weights + plan.mapped >= sum(t.nbytes for t in made.tensors.values())


def test_what_does_not_fit_is_refused_with_what_would(monkeypatch):
    monkeypatch.setattr(memory, "used_bytes", lambda: 0)
    made = planner()
    needed = made.plan(8192).needed
    monkeypatch.setattr(memory, "memory_bytes", lambda: needed)
    made.require(8192, "model")
    monkeypatch.setattr(memory, "memory_bytes", lambda: needed - 1_000_000)
    with pytest.raises(OnDeviceError, match=r"needs .* MB for a context of 8192 tokens; this") as refused:
        made.require(8192, "model")
    found = re.fullmatch(r"What would fit: --context (\d+) \(.*\); or the model in 8 bits \(.*\)\.", refused.value.hint)
    longest = int(found[1])
    assert made.plan(longest).needed <= needed - 1_000_000 < made.plan(longest + memory.ROUND).needed
    monkeypatch.setattr(memory, "memory_bytes", lambda: 1000)
    with pytest.raises(OnDeviceError, match="this machine has 0 MB") as refused:
        made.require(8192, "model")
    assert refused.value.hint == "Take a smaller model."


def test_other_programs_are_asked_to_make_room(monkeypatch):
    made, said = planner(), []
    plan = made.plan(8192)
    monkeypatch.setattr(memory, "free_bytes", lambda: plan.needed - plan.base)
    made.require(8192, "model", said.append)
    assert not said
    monkeypatch.setattr(memory, "free_bytes", lambda: plan.needed - plan.base - 100_000)
    made.require(8192, "model", said.append)
    assert len(said) == 1 and "close other programs" in said[0]
    monkeypatch.setattr(memory, "free_bytes", lambda: None)
    made.require(8192, "model", said.append)
    assert len(said) == 1


def test_fewer_bits_only_where_they_save(monkeypatch):
    monkeypatch.setattr(memory, "used_bytes", lambda: 0)
    made = planner()
    made.tensors = memory.quantized(made.tensors, 4)
    tight = made.plan(8192).needed - 100_000
    assert [how for how, _ in made.fitting(tight, 8192)][-1] == "the model in 3 bits"
    assert memory.quantized(made.tensors, 8) == made.tensors


def test_experts_in_the_file_may_stay_there():
    moe = {**HF, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    config = families()["qwen3_moe"].config(moe | {"model_type": "qwen3_moe"})
    tensors = {name: blank(shape, Dense("bfloat16")) for name, shape in expected(config).items()}
    plan = memory.Planner(config, tensors, create_backend("cpu")).plan(256)
    experts = {name: tensor.nbytes for name, tensor in tensors.items() if len(tensor.shape) == 3}
    assert len(experts) == 9 and plan.idle == sum(experts.values()) * 6 // 8
    assert plan.needed == plan.total - plan.idle
    stacked = memory.Planner(config, tensors, create_backend("cpu"), copied=experts).plan(256)
    assert stacked.idle == 0 and stacked.weights == plan.weights + sum(experts.values())
    assert stacked.weights + stacked.mapped == plan.weights + plan.mapped


def test_what_stands_apart_in_the_file_is_planned_as_a_copy(tmp_path):
    """Experts one a tensor are stacked when they are read: they leave the file's pages."""
    with open_checkpoint(write_tiny_model(tmp_path / "tiny")) as checkpoint:
        family, hf = family_of(checkpoint)
        config = family.config(hf)
        parameters, ops = Parameters(family, config, checkpoint), create_backend("cpu")
        plan = memory.Planner.of(config, parameters, ops).plan(100)
        assert plan.mapped == sum(parameters[name].nbytes for name in parameters if len(parameters.shapes[name]) > 1)
        name = "layers.1.mlp.up"
        (stored,) = parameters.stored(name)
        parameters._where[name] = [stored] * 3
        parameters.shapes[name] = (3, *parameters.shapes[name])
        copied, one = memory.Planner.of(config, parameters, ops).plan(100), checkpoint[stored].nbytes
        assert copied.weights == plan.weights + 3 * one and copied.mapped == plan.mapped - one


def test_a_model_that_cannot_fit_is_refused_before_it_is_read(tmp_path, monkeypatch):
    folder = write_tiny_model(tmp_path / "tiny")
    monkeypatch.setattr(memory, "memory_bytes", lambda: 1_000_000)
    monkeypatch.setattr(Parameters, "prepare", lambda *_: pytest.fail("read"))
    with pytest.raises(OnDeviceError, match="tiny needs"):
        open_session(folder)


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, True])
def test_the_plan_is_the_peak_of_the_real_model(smollm2_gguf, exact):
    """Within a tenth, for a context that is filled to the last place."""
    program = f"""
from ondevice.runtime import memory
from ondevice.runtime.engine import GenerateOptions
from ondevice.runtime.session import open_session
plans = []
memory.Planner.require = lambda self, context, *rest: plans.append(self.plan(context).total)
session = open_session({str(smollm2_gguf)!r}, context=2048, backend="cpu", exact={exact})
session.tokenizer.encode("a")
list(session.generate([100 + i for i in range(2040)], GenerateOptions(max_tokens=8)))
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(plans[0], int(peak.split()[1]) * 1024)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux tells a process its peak apart from its parent's")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    planned, peak = map(int, done.stdout.split())
    assert abs(planned - peak) <= 0.1 * peak, f"planned {planned / 1e6:.0f} MB, measured {peak / 1e6:.0f} MB"
