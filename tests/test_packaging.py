"""What is installed: one import name, real folders behind it, plug-ins, no heavy requirement; and with no compiler."""

import email
import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("scikit_build_core")
pytest.importorskip("nanobind")


def build(folder: Path, **environment) -> Path:
    """A wheel of a clean copy of the tree, so that nothing built by hand gets in."""
    tree = folder / "tree"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, tracked.stdout.split("\0")):
        source, copy = ROOT / name, tree / name
        if not source.exists():
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            copy.symlink_to(os.readlink(source))
        else:
            copy.write_bytes(source.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory):
    return build(tmp_path_factory.mktemp("wheel"), CXX="/bin/false", CMAKE_GENERATOR="Ninja")


def test_one_import_name_with_real_folders(without_compiler):
    with zipfile.ZipFile(without_compiler) as wheel:
        names = wheel.namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"ondevice"}
    for part in ("backends/base.py", "models/decoder.py", "tools/__init__.py", "cli/__init__.py"):
        assert f"ondevice/{part}" in names


def test_plug_ins_and_requirements(without_compiler):
    with zipfile.ZipFile(without_compiler) as wheel:
        info = next(n for n in wheel.namelist() if n.endswith("/METADATA"))
        metadata = email.message_from_bytes(wheel.read(info))
        entries = wheel.read(info.replace("METADATA", "entry_points.txt")).decode()
    core = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert not [r for r in core if r.startswith(("torch", "transformers"))]
    assert {"numpy", "click", "sentencepiece", "huggingface-hub"} <= {r.split(">")[0].strip() for r in core}
    assert all(f"{name} = ondevice.backends." in entries for name in ("reference", "cpu", "cuda", "mlx"))
    assert all(f"{name} = ondevice.models.families." in entries for name in ("llama", "qwen3", "gemma3"))


def test_without_a_compiler_it_runs_on_numpy_and_says_so(without_compiler, tmp_path):
    with zipfile.ZipFile(without_compiler) as wheel:
        assert not [n for n in wheel.namelist() if "_native" in n and n.endswith((".so", ".pyd"))]
        wheel.extractall(tmp_path)
    # -S: site-packages stands on the path, but its .pth files, which would lead to an editable install, are not read
    path = os.pathsep.join([str(tmp_path), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    done = subprocess.run(
        [sys.executable, "-S", "-m", "ondevice", "doctor", "--json"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["path"] == str(tmp_path / "ondevice") and not facts["links"]
    cpu = next(b for b in facts["backends"] if b["name"] == "cpu")
    assert (
        cpu["available"] and "NumPy" in cpu["device"] and "not compiled" in cpu["reason"] and "compiler" in cpu["hint"]
    )


@pytest.mark.slow
def test_with_a_compiler_the_kernels_are_inside(tmp_path):
    with zipfile.ZipFile(build(tmp_path)) as wheel:
        native = [n for n in wheel.namelist() if "_native" in n and n.endswith((".so", ".pyd"))]
    assert native and native[0].startswith("ondevice/backends/cpu/")
