"""docs/families.md is true: its code is the toy package, whole, and its commands work."""

from __future__ import annotations

import re
import shutil

import pytest

from ondevice.models import families
from ondevice.models.config import AttentionConfig, LayerConfig, MLPConfig, ModelConfig
from tests.plugins.pages import Page

PAGE = Page("families.md", "toy_family")


@pytest.mark.parametrize("file", PAGE.files)
def test_the_code_shown_is_the_package(file):
    assert PAGE.shown(file) == PAGE.held(file)


def test_a_family_takes_thirty_lines():
    """Package, family and test together, blank lines aside."""
    assert len(PAGE.files) == 3
    assert sum(len(PAGE.held(file)) for file in PAGE.files) <= 30


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    pytest.importorskip("transformers")
    return PAGE.run(tmp_path_factory.mktemp("toy"))


def test_the_commands_of_the_page(ran):
    """Installed, green beside its twin, and a family like ours."""
    assert "1 passed" in ran.output
    assert ran.output.split("\n")[-2].split() == sorted([*families.families(), "toy"])


def test_the_twin_notices_a_wrong_family(ran, tmp_path):
    shutil.copytree(ran.environment["PYTHONPATH"], tmp_path, dirs_exist_ok=True)
    module = tmp_path / "toy_family.py"
    module.write_text(module.read_text().replace("llama_like(hf,", "llama_like(hf, norm_offset=0.001,"))
    done = ran.run("pytest", "tests", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "allowed" in done.stdout


def test_every_keyword_of_the_page_exists():
    table = PAGE.text.split("## What a config can say")[1].split("## Names")[0]
    named = set(re.findall(r"`(\w+)=", table))
    known = set(ModelConfig.llama_like.__kwdefaults__) | set(ModelConfig.__dataclass_fields__)
    assert named and named <= known
    parts = {"attention": AttentionConfig, "mlp": MLPConfig, "layer": LayerConfig}
    fields = re.findall(r'`(attention|mlp|layer)=\{"(\w+)": ', table)
    assert fields and all(field in parts[part].__dataclass_fields__ for part, field in fields)


def test_every_name_of_the_page_is_a_parameter():
    names = PAGE.text.split("## Names")[1].split("## GGUF")[0]
    known = {key for family in families.families().values() for key in family.names}
    assert set(re.findall(r"`(layers\.\{i\}\.[\w.]+)`", names)) <= known
