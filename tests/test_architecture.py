"""Who may import whom (docs/architecture.md), and what must not be loaded before it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = (
    "numpy",
    "torch",
    "mlx",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "jinja2",
    "rich",
    "gguf",
    "huggingface_hub",
)
BOTTOM = ("errors", "tensors", "schemes", "noise")
ALLOWED = {  # a part -> what else of ours it may import at module level or below
    "errors": (), "tensors": (), "noise": (), "installed": (), "machine": (), "schemes": BOTTOM, "catalog": (),
    "registry": (*BOTTOM, "installed"),
    "checkpoint": (*BOTTOM, "checkpoint"), "hub": (*BOTTOM, "catalog", "registry", "checkpoint", "hub"),
    "pictures": (*BOTTOM, "checkpoint"),
    "backends": (*BOTTOM, "installed", "machine", "registry", "backends"),
    "models": (*BOTTOM, "registry", "checkpoint", "backends.base", "models"),
    "adapters": (*BOTTOM, "checkpoint", "backends.base", "models", "adapters"),
    "runtime": (*BOTTOM, "machine", "registry", "checkpoint", "hub", "backends.base", "models", "adapters", "runtime"),
    "train": (
        *BOTTOM, "machine", "pictures", "registry", "checkpoint", "backends.base", "models", "adapters", "runtime",
        "train",
    ),
    "tools": (
        *BOTTOM, "machine", "pictures", "registry", "checkpoint", "hub", "backends.base", "models", "adapters",
        "runtime", "train", "tools",
    ),
    "testing": (*BOTTOM, "registry", "checkpoint", "backends", "models", "runtime", "testing"),
}  # fmt: skip


def modules():
    for path in sorted((ROOT / "ondevice").rglob("*.py")):
        yield path
    for folder in ("backends", "models", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield ROOT / "ondevice" / path.relative_to(ROOT)


def imports(path: Path):
    """Our own modules that a file imports, as dotted names behind `ondevice.`"""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            name = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            names = [f"{name}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (n.removeprefix("ondevice.") for n in names if n.startswith("ondevice."))


@pytest.mark.parametrize("path", list(dict.fromkeys(modules())), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    part = path.relative_to(ROOT / "ondevice").with_suffix("").parts[0]
    if part in ("__init__", "__main__", "cli"):
        return  # the top, which may use everything
    wrong = [n for n in imports(path) if not any(n == a or n.startswith(a + ".") for a in ALLOWED[part])]
    assert not wrong, f"{part} may not import {wrong}"


def test_one_backend_never_imports_another():
    for name in ("cpu", "cuda", "mlx"):
        for path in (ROOT / "ondevice" / "backends" / name).rglob("*.py"):
            others = {"cpu", "cuda", "mlx"} - {name}
            assert not [n for n in imports(path) for o in others if n.startswith(f"backends.{o}")], path


def heavy_imports(path: Path):
    """What a file imports as soon as it is imported itself."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        yield from (n for n in names if n.split(".")[0] in ("torch", "mlx", "transformers", "triton"))


def test_frameworks_stay_in_their_backends():
    for path in modules():
        part = path.relative_to(ROOT / "ondevice").parts
        if part[:2] not in (("backends", "cuda"), ("backends", "mlx")) or part[-1] == "__init__.py":
            assert not list(heavy_imports(path)), path


def test_only_the_console_touches_the_terminal():
    for path in modules():
        if path.name == "console.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            touched = isinstance(node, ast.Attribute) and node.attr in ("stdout", "stderr")
            assert not (touched and ast.unparse(node).startswith("sys.")), f"{path}:{node.lineno}"


def test_only_the_console_prints():
    for path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [
            n
            for n in ast.walk(tree)
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "print"
        ]
        assert not calls, f"{path} prints"


@pytest.mark.parametrize("code", ["import ondevice", "import ondevice.cli; ondevice.cli.main(['--help'])"])
def test_nothing_heavy_is_loaded_early(code):
    program = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint('LOADED', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = done.stdout.rpartition("LOADED")[2].split()
    assert not [m for m in loaded if m.split(".")[0] in HEAVY]


def test_the_links_are_links():
    for name in ("backends", "models", "tools"):
        assert (ROOT / "ondevice" / name).resolve() == ROOT / name


def test_functions_fit_a_screen():
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < 80, f"{path}:{node.lineno} {node.name}"


def test_tests_are_packages():
    """What they share is imported by its whole name, so that folders can be run together in any order."""
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py") if "toy_" not in str(path)}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]
