"""The cuda backend beside the reference: all its modes on torch's CPU device; the GPU's own where there is one."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from ondevice.testing.conformance import *  # noqa: F403

torch = pytest.importorskip("torch")

from ondevice.backends import cuda as face  # noqa: E402
from ondevice.backends.base import LayerCache, RouteRule, Step  # noqa: E402
from ondevice.backends.cuda.backend import CudaBackend  # noqa: E402
from ondevice.backends.cuda.experts import TorchRouting  # noqa: E402
from ondevice.backends.cuda.graphs import Replay  # noqa: E402
from ondevice.errors import BadOption  # noqa: E402
from ondevice.tensors import dense  # noqa: E402

CPU = torch.device("cpu")


class LikeOnAGpu(CudaBackend):
    """Weights packed, decode steps in the form that a CUDA graph records, without the recording."""

    def compile(self, fn, state=()):
        return Replay(self, fn, capture=False)


MODES = {
    "exact": lambda: CudaBackend(CPU, "float32", exact=True, packed=False),
    "like_on_a_gpu": lambda: LikeOnAGpu(CPU, "float32", exact=True, packed=True),
    "bfloat16": lambda: LikeOnAGpu(CPU, "bfloat16", exact=False, packed=True),
}
if torch.cuda.is_available():
    GPU = torch.device("cuda")
    MODES |= {
        "gpu_exact": lambda: CudaBackend(GPU, "float32", exact=True, packed=True),
        "gpu": lambda: CudaBackend(GPU, "bfloat16", exact=False, packed=True),
    }


@pytest.fixture(scope="module", params=MODES)
def backend(request):
    return MODES[request.param]()


def test_experts_are_recorded_without_asking_the_host(monkeypatch) -> None:
    ops, random = MODES["like_on_a_gpu"](), np.random.default_rng(0)
    weight = ops.prepare(dense(random.standard_normal((6, 3, 8), np.float32)))
    cache = ops.new_cache([LayerCache(1, 8, 8)], 7, 4)
    ids, step = ops.array(np.arange(7, dtype=np.int32)[:, None]), replace(Step.whole(7, 1), cache=cache)
    table = ops.array(random.standard_normal((7, 8), np.float32))

    def layer(ids, step):
        x = table[ids[:, 0].long()]
        return ops.expert_linear(x, weight, ops.route(x[:, :6], 4, RouteRule()))

    want = layer(ids, step)
    monkeypatch.setattr(TorchRouting, "groups", lambda *_: pytest.fail("the host was asked"))
    assert torch.allclose(ops.compile(layer)(ids, step), want, atol=1e-5)


KERNELS = """
import numpy as np, torch
from ondevice import schemes
from ondevice.backends.cuda import kernels
from ondevice.backends.cuda.weights import PackedWeight

assert kernels.INTERPRETED
random = np.random.default_rng(0)
for bits in schemes.AFFINE_BITS:
    for group, outputs, tokens in ((16, 3, 1), (32, 33, 3), (64, 8, 4), (128, 1, 2)):
        inputs = group * 6
        codes = random.integers(0, 1 << bits, (outputs, inputs)).astype(np.uint8)
        words = torch.from_numpy(schemes.pack(codes, bits).view(np.int32))
        scales, biases = torch.randn(outputs, 6).half(), torch.randn(outputs, 6)
        w, x = PackedWeight(words, scales, biases, bits, group), torch.randn(tokens, inputs)
        assert kernels.serves(x) and not kernels.serves(torch.zeros(5, inputs))
        want = x @ w.numbers(torch.float32).T
        error = (w.apply(x, None) - want).abs().max() / want.abs().max()
        assert error < 1e-5, (bits, group, float(error))
"""


def test_triton_kernels_interpreted() -> None:
    """In a process of its own: Triton decides at import whether to interpret."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", KERNELS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("torch_version, gpus, priority", [("2.9.0", 2, 90), ("2.9.0+cpu", 2, 5), ("2.9.0", 0, 5)])
def test_probe_weighs_what_is_here(monkeypatch, torch_version: str, gpus: int, priority: int) -> None:
    monkeypatch.setattr(face, "version", lambda name: torch_version)
    monkeypatch.setattr(face, "gpu_count", lambda: gpus)
    probe = face.probe()
    assert probe.ready and probe.priority == priority
    assert ("pip install torch" in probe.hint) == (gpus == 2 and priority == 5)


def test_probe_without_torch(monkeypatch) -> None:
    monkeypatch.setattr(face, "version", lambda name: None)
    assert not face.probe().ready and face.probe().hint == "pip install torch"


def test_probe_distrusts_a_folder_of_that_name(monkeypatch, tmp_path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch")
    probe = face.probe()
    assert not probe.ready and str(tmp_path) in probe.reason


def test_wrong_options_are_two_lines() -> None:
    for options in ({"dtype": "int4"}, {"device": "gpu"}):
        with pytest.raises(BadOption) as caught:
            face.create(**options)
        assert caught.value.hint
