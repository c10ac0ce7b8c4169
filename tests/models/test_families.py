"""The registry of families: short tables, listed in README, named nowhere else."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from ondevice.registry import families
from tests.models import twins

ROOT = Path(__file__).parents[2]
FAMILIES = ROOT / "models" / "families"


def table() -> str:
    """README's, of the families of this package: `python -m tests.models.test_families` prints it."""
    rows = ["| models | `model_type` | GGUF |", "| --- | --- | --- |"]
    ours = {name: f for name, f in families().items() if f.models}
    for name, family in sorted(ours.items(), key=lambda item: item[1].models.lower()):
        types = ", ".join(f"`{kind}`" for kind in family.model_types)
        rows.append(f"| {family.models} | {types} | {f'`{family.gguf.architecture}`' if family.gguf else ''} |")
        assert name.isidentifier()
    return "\n".join(rows) + "\n"


def test_readme_lists_them():
    assert table() in (ROOT / "README.md").read_text(encoding="utf-8"), f"README's table should be\n{table()}"


def test_every_one_has_a_twin():
    types = {name.split("-")[0] for name in twins.TWINS} | {"qwen3_vl_moe"}  # whose twin also sees: test_text_part
    assert {name for name, family in families().items() if family.models} <= types


def test_every_one_is_registered():
    """What a file of families/ defines, pyproject.toml names."""
    registered = set(re.findall(r"ondevice\.models\.families\.(\w+:\w+)", (ROOT / "pyproject.toml").read_text()))
    defined = {
        f"{p.stem}:{name}"
        for p in FAMILIES.glob("*.py")
        for name in re.findall(r"^(\w+) = Family\(", p.read_text(), re.M)
    }
    assert defined == registered


TABLES = [p.stem for p in FAMILIES.glob("*.py") if p.stem not in ("__init__", "gguf", "views", "writing")]


@pytest.mark.parametrize("name", TABLES)
def test_adding_one_takes_at_most_thirty_lines(name):
    """Of what a family is: its names, its config, its entry; llama.cpp's names for it, imports and docstring aside."""
    tree = ast.parse((FAMILIES / f"{name}.py").read_text(encoding="utf-8"))
    own = [node for node in tree.body[1:] if not isinstance(node, ast.Import | ast.ImportFrom) and not of_gguf(node)]
    entries = sum(isinstance(n, ast.Assign) and ast.unparse(n.value).startswith("Family(") for n in own)
    assert sum(node.end_lineno - node.lineno + 1 for node in own) / entries <= 30


def of_gguf(node: ast.stmt) -> bool:
    """Whether a function or a table is for reading that format: their names say so."""
    name = getattr(node, "name", "") or ast.unparse(getattr(node, "targets", [node])[0])
    return "gguf" in name.lower() or name == "KEYS"


def test_nothing_else_names_one():
    """No module of the definition, of a backend or of the engine compares with a family's name."""
    names = {t for family in families().values() if family.models for t in (family.name, *family.model_types)}
    for path in [*(ROOT / "models").glob("*.py"), *(ROOT / "backends").rglob("*.py")]:
        words = {n.value for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Constant)}
        assert not names & {w for w in words if isinstance(w, str)}, path


if __name__ == "__main__":
    print(table(), end="")
