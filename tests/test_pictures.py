"""Every kind of picture is drawn, in every format; what cannot be is said before the work is done."""

import subprocess
import sys

import pytest

from ondevice import pictures
from ondevice.errors import BadOption, Unavailable

pytest.importorskip("matplotlib")

SIGNATURES = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
KINDS = {
    "lines": lambda path: pictures.lines(
        path, "Loss", {"train": ([1, 2, 3], [3.0, 2.0, 1.5])}, "step", "nats", marks={"best": 2}, log=True
    ),
    "bars": lambda path: pictures.bars(path, "Bytes", {"q": {"0": 1, "1": 2}, "k": {"1": 3, "2": 1}}, "layer", "MB"),
    "points": lambda path: pictures.points(
        path, "Plans", {"tried": [(80, 0.3, "a"), (60, 0.9, "b")], "none": []}, "MB", "KL", joined=["tried"], log=True
    ),
    "heat": lambda path: pictures.heat(
        path, "Load", [[0.1, 0.9], [0.5, 0.5]], "expert", "layer", ["0", "1"], ["0", "1"]
    ),
}


@pytest.mark.parametrize("suffix", SIGNATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_drawn(tmp_path, kind, suffix):
    path = tmp_path / f"picture{suffix}"
    KINDS[kind](path)
    assert path.read_bytes().startswith(SIGNATURES[suffix])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_stacked_bars_stand_on_each_other(tmp_path):
    """What is drawn is what was given: an svg holds its numbers as text and its labels too."""
    path = tmp_path / "bars.svg"
    KINDS["bars"](path)
    drawn = path.read_text(encoding="utf-8")
    assert all(f"<!-- {word} -->" in drawn for word in ("Bytes", "layer", "MB", "q", "k"))


@pytest.mark.parametrize("name", ["picture.bmp", "picture", "nowhere/picture.png"])
def test_a_picture_that_cannot_be_is_refused_first(tmp_path, name):
    with pytest.raises(BadOption) as caught:
        pictures.require(tmp_path / name)
    assert caught.value.hint


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(Unavailable, match="matplotlib"):
        pictures.require(tmp_path / "picture.png")


def test_nothing_is_loaded_before_it_is_needed():
    program = "import sys, ondevice.pictures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_labels_of_points_do_not_lie_over_one_another(monkeypatch, tmp_path):
    """Where they are when the picture is written, in pixels."""
    apart, boxes = pictures._apart, []

    def seen(axes, notes):
        apart(axes, notes)
        axes.figure.draw_without_rendering()
        boxes.extend(note.get_window_extent() for note in notes)

    monkeypatch.setattr(pictures, "_apart", seen)
    near = [(50, 0.5, "vocabulary / 3"), (50, 0.51, "vocabulary / 2"), (51, 0.52, "layers -1"), (200, 3, "original")]
    pictures.points(tmp_path / "picture.png", "Plans", {"tried": near[:2], "expected": near[2:]}, "MB", "nats")
    assert len(boxes) == 4 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
