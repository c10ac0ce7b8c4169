"""prune --target: one figure, and the cheapest cuts that reach it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ondevice.checkpoint import open_checkpoint
from ondevice.cli import main
from ondevice.errors import BadOption
from ondevice.models.families import family_of
from ondevice.tools.prune import Amount, Options, prune
from ondevice.tools.prune.cutting import Cut
from ondevice.tools.prune.target import Rung, best, rungs, saved
from tests.tools.wide_models import LLAMA, MOE, write_model

IDLE = {f"layers_{i}_{part}": np.zeros((64, n), np.float32) for i in (1, 3) for part, n in
        (("attn_o", 64), ("mlp_down", 96))}  # fmt: skip


def config_of(folder):
    with open_checkpoint(folder) as checkpoint:
        family, hf = family_of(checkpoint)
        return family.config(hf)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the end and the other hand in the band, on the one hand and then there is the sand. " * 30)
    return path


def test_what_does_nothing_goes_first(tmp_path, capsys):
    """Two of five layers do nothing, so that a seventh of the model costs nothing, by what it says itself."""
    source = write_model(tmp_path / "in", LLAMA | {"num_hidden_layers": 5}, "float32", **IDLE)
    chosen = Options(target=Amount(share=0.14), tokens=1024, length=64)
    *_, result = prune(source, tmp_path / "out", chosen)
    assert 1 - result.after.parameters / result.before.parameters >= 0.14
    costs = {row.name: row.value for row in result.scores[0].rows}
    gone = [row.name for row in result.scores[0].rows if not row.stays]
    assert costs["1 layer goes"] == 0 < costs["1 key head goes"] and sum(costs[name] for name in gone) == 0
    assert any("10% of channels go: not tried" in note for note in result.notes)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    with pytest.raises(SystemExit) as stop:
        main(["prune", str(source), "--target", "14%", "--tokens", "1024", "--dry-run", "--json"])
    assert stop.value.code == 0
    facts = json.loads(capsys.readouterr().out)
    assert sum(row["value"] for row in facts["scores"][0]["rows"] if not row["stays"]) == 0 and facts["path"] is None
    assert [scores["verdict"] for scores in facts["scores"]] == ["left out", "stays"]  # of cuts; of layers


def test_the_cheapest_of_all_ways_that_save_enough(tmp_path):
    config = config_of(write_model(tmp_path / "in"))
    whole = Cut.nothing(config)
    fewer = {i: np.arange(64) for i in range(2)}
    one = Rung("layers", "one layer", {}, Cut(config, (0,)), 0.5)
    some = Rung("channels", "channels", {}, Cut(config, whole.layers, channels=fewer), 0.1)
    tokens = Rung("vocabulary", "tokens", {}, Cut(config, whole.layers, tokens=np.arange(60)), 0.2)
    tried = [one, some, tokens]
    for wanted in (1, some.saved + 1, some.saved + tokens.saved, one.saved, one.saved + tokens.saved):
        way = best(tried, wanted)
        others = [[r for r, bit in zip(tried, f"{n:03b}", strict=True) if bit == "1"] for n in range(1, 8)]
        enough = [sum(r.loss for r in other) for other in others if saved(other) >= wanted]
        assert sum(r.loss for r in way) == pytest.approx(min(enough)) and saved(way) >= wanted
    assert saved([one, some]) < one.saved + some.saved
    assert best(tried, 10**9) is None


def test_what_may_be_tried(tmp_path):
    kinds = {rung.kind for rung in rungs(config_of(write_model(tmp_path / "moe", MOE)))}
    assert kinds == {"vocabulary", "layers", "heads", "experts"}


def test_targets_that_make_no_sense(tmp_path, text):
    with pytest.raises(BadOption, match="--target chooses what goes"):
        Options(target=Amount(share=0.2), layers=Amount(1))
    with pytest.raises(BadOption, match="--target 3 makes no sense"):
        Options(target=Amount(3))
    source = write_model(tmp_path / "in")
    with pytest.raises(BadOption, match="No cuts save 95%"):
        list(prune(source, tmp_path / "out", Options(target=Amount(share=0.95), calibration=text, length=16)))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
