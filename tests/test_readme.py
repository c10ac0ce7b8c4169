"""Every command that README shows is run, in order, as a newcomer would."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ondevice.catalog import CATALOG, DEFAULT

ROOT = Path(__file__).parent.parent


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)


def commands():
    return [
        line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")
    ]


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory, smollm2_gguf):
    """An empty folder, a home in which the default model has been fetched, and `ondevice` on the path."""
    folder = tmp_path_factory.mktemp("newcomer")
    kept = folder / "home" / "models" / DEFAULT / CATALOG[DEFAULT].file
    kept.parent.mkdir(parents=True)
    kept.symlink_to(smollm2_gguf)
    work = folder / "work"
    work.mkdir()
    (work / "README.md").symlink_to(ROOT / "README.md")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return work, {**os.environ, "ONDEVICE_HOME": str(folder / "home"), "HF_HUB_CACHE": str(folder / "hf"), "PATH": path}


def test_the_tour_shows_the_main_commands():
    shown = " ".join(commands())
    assert all(
        f"ondevice {name}" in shown for name in ("pull", "generate", "chat", "convert", "eval", "bench", "doctor")
    )


def test_the_commands_of_the_tour(newcomer):
    """One test, for later ones take up what earlier ones made, and tests may be shared out among processes."""
    work, environment = newcomer
    for command in commands():
        done = subprocess.run(
            command, shell=True, cwd=work, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert done.stdout.strip(), command


@pytest.mark.parametrize("program", blocks("python"))
def test_a_program_of_the_readme(newcomer, program):
    work, environment = newcomer
    done = subprocess.run([sys.executable, "-c", program], cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
