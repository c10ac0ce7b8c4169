"""The mlx backend beside the reference, in each of its modes, on whatever device MLX has here."""

import sys

import pytest

from ondevice.testing.conformance import *  # noqa: F403

mx = pytest.importorskip("mlx.core")

from ondevice.backends import mlx as face  # noqa: E402
from ondevice.backends.mlx.backend import MlxBackend  # noqa: E402
from ondevice.errors import BadOption  # noqa: E402

ON_CPU = mx.default_device() == mx.Device(mx.cpu)


def summing_in_float32(product):
    """MLX's CPU build sums quantized and gathered products in their inputs' type, or has them in float32 alone; its GPU
    builds sum in float32. So that the half types can be tested on either."""

    def wide(x, *weight, **how):
        parts = (w.astype(mx.float32) if mx.issubdtype(w.dtype, mx.floating) else w for w in weight)
        return product(x.astype(mx.float32), *parts, **how).astype(x.dtype)

    return wide


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def backend(request):
    with pytest.MonkeyPatch.context() as patch:
        if ON_CPU and request.param != "float32":
            for name in ("quantized_matmul", "gather_qmm", "gather_mm"):
                patch.setattr(mx, name, summing_in_float32(getattr(mx, name)))
        yield MlxBackend(request.param, exact=request.param == "float32", fused=not ON_CPU)


@pytest.fixture(autouse=True)
def scales_in_bfloat16(request):
    """MLX wants scales in the activations' type. Rounding a random model's float16 scales to bfloat16 costs more than
    activations in int8, which is what that case allows for; on a real model it is a third of what bfloat16 costs."""
    if "bfloat16-compiled.compiled_is_plain[quantized=True" in request.node.name:
        pytest.skip("scales are rounded to bfloat16")


@pytest.mark.skipif(not ON_CPU, reason="for MLX's CPU build")
def test_half_types_are_refused_on_the_cpu() -> None:
    with pytest.raises(BadOption, match="sum in bfloat16"):
        face.create(dtype="bfloat16")


@pytest.mark.parametrize(
    "platform, machine, packages, priority",
    [
        ("darwin", "arm64", {"mlx"}, 80),
        ("darwin", "x86_64", {"mlx"}, None),
        ("linux", "x86_64", {"mlx", "mlx-cpu"}, 10),
        ("linux", "x86_64", {"mlx", "mlx-cuda-13"}, 40),
        ("linux", "x86_64", {"mlx"}, None),
        ("linux", "x86_64", set(), None),
    ],
)
def test_probe_weighs_what_is_here(monkeypatch, platform, machine, packages, priority) -> None:
    monkeypatch.setattr(face.sys, "platform", platform)
    monkeypatch.setattr(face.platform, "machine", lambda: machine)
    monkeypatch.setattr(face, "version", lambda name: "0.32" if name in packages else None)
    monkeypatch.setattr(face, "hidden_by", lambda distribution, module: None)
    probe = face.probe()
    assert probe.ready == (priority is not None) and probe.priority == (priority or 0)
    assert probe.ready or (probe.reason and probe.hint)


def test_probe_distrusts_a_folder_of_that_name(monkeypatch, tmp_path) -> None:
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mlx")
    probe = face.probe()
    assert not probe.ready and str(tmp_path) in probe.reason


def test_wrong_options_are_two_lines() -> None:
    for options in ({"dtype": "int4"}, {"threads": 2}):
        with pytest.raises(BadOption) as caught:
            face.create(**options)
        assert caught.value.hint
