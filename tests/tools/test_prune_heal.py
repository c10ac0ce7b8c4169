"""prune --heal: the original teaches what is left of it, in the tokens that stay; bad input."""

from __future__ import annotations

import errno
import json
import os
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from ondevice.cli import main
from ondevice.errors import OnDeviceError
from ondevice.runtime.session import open_session
from ondevice.runtime.tokenizer import load_tokenizer
from ondevice.schemes import to_float
from ondevice.tools import teaching
from ondevice.tools.calibration import samples
from ondevice.tools.prune import Amount, Lessons, Options, Progress, healing, prune
from ondevice.tools.prune.rewording import reworded
from ondevice.tools.prune.subject import Subject
from ondevice.tools.prune.tokens import encoding, rewritten
from ondevice.tools.teaching import VALIDATIONS
from ondevice.tools.translation import Translation, Translator
from ondevice.train.batches import make_batch
from ondevice.train.data import Example
from ondevice.train.encode import encoded
from tests.tools.wide_models import LLAMA, write_model

PROSE = "the end and the other hand in the band, on the one hand and then there is the sand. "
QUICK = {"minutes": 5.0, "length": 24, "batch_size": 4, "learning_rate": 1e-2, "held_out": 0.2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("whole") / "in", LLAMA, "float32")


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_text(PROSE * 40)
    return path


@pytest.fixture(scope="module")
def fewer(model, tmp_path_factory):
    """(Translation, original's tokenizer, tokenizer with fewer tokens, old ids that stay)."""
    folder = tmp_path_factory.mktemp("fewer")
    with Subject(model, Options(vocabulary=Amount(100))) as subject:
        how, old, files = encoding(subject.files), subject.tokenizer, subject.files
    made = [id for id, text in how.texts.items() if len(text) > 1 and id not in old.special_ids]
    gone = {id for id in made if id not in {n for other in made[:1] for n in how.needs(other)}}
    kept = np.array([id for id in range(old.vocab_size) if id not in gone])
    for name, content in rewritten(how, files, kept).items():
        (folder / name).write_bytes(content)
    new = load_tokenizer(folder)
    return Translation(old, new, kept), old, new, kept


def test_tokens_that_went_begin_with_what_is_now_said_first(fewer):
    translation, old, new, kept = fewer
    assert translation.firsts[kept].tolist() == list(range(len(kept)))
    gone = np.setdiff1d(np.arange(old.vocab_size), kept)
    assert len(gone) >= 3
    for id in gone.tolist():
        assert translation.firsts[id] == new.encode(old.decode([id]))[0]


def chances_of(rows, vocab):
    made = np.exp(np.random.default_rng(3).normal(size=(rows, vocab)) * 4)
    return made / made.sum(-1, keepdims=True)


def test_probability_is_neither_lost_nor_made(fewer):
    translation, old, _, kept = fewer
    chances = chances_of(5, old.vocab_size)
    wanted = np.zeros((5, len(kept)))
    for id, first in enumerate(translation.firsts):
        wanted[:, first] += chances[:, id]
    assert np.abs(translation.spoken(chances) / wanted - 1).max() < 1e-5


def test_pieces_together_are_as_likely_as_the_token_was(fewer):
    translation, old, _, kept = fewer
    chances = chances_of(1, old.vocab_size)
    first = translation.spoken(chances)[0]
    whole = [id for id in kept.tolist() if (translation.firsts[id],) in translation.longer]
    assert whole and max(map(len, translation.spelled.values())) > 2
    for id in [*translation.spelled, *whole]:
        pieces = translation.spelled.get(id, (int(translation.firsts[id]),))
        likely = first[pieces[0]]
        for at in range(1, len(pieces)):
            ended = int(kept[pieces[0]]) if at == 1 else None
            goes, ends = translation.going_on(chances[0], pieces[:at], ended)
            assert abs(goes.sum() + ends - 1) < 1e-5
            likely *= goes[pieces[at]]
        if pieces in translation.longer:
            likely *= translation.going_on(chances[0], pieces, id)[1]
        alike = [other for other, said in translation.spelled.items() if said == pieces] or [id]
        if len(pieces) < 3:  # behind more, that the first two are tokens by themselves is left out
            assert abs(likely / chances[0, alike].sum() - 1) < 1e-4


def test_the_original_teaches_at_every_place(fewer, model):
    """Where both ways of cutting a text meet, what it says itself; over all places, what it says of the text."""
    translation, old, new, _ = fewer
    ids = new.encode(PROSE)
    restored = translation.restored(ids)
    assert restored == old.encode(PROSE) and len(restored) < len(ids)
    rows = [encoded(ids, [(0, len(ids))]), encoded(ids[:9], [(0, 9)])]
    batch = make_batch([Example((row,), str(i)) for i, row in enumerate(rows)], [[0], [1]])
    with open_session(model, backend="reference") as original:
        teacher = Translator(original.decoder, translation=translation)
        taught = teacher.read(batch)
        logits = original.backend.numpy(teacher.logits(taught.hidden)).reshape(*batch.ids.shape, -1)
        alone = original.decoder(original.backend.array(np.array([restored], np.int32)), _whole(restored))
        alone = original.backend.numpy(alone).astype(np.float64)
    alone = np.exp(alone.reshape(-1, alone.shape[-1])[-len(restored) :])
    alone /= alone.sum(-1, keepdims=True)
    said, known = np.exp(logits.astype(np.float64)), taught.known.reshape(batch.ids.shape)
    begun = int(np.flatnonzero(translation.meeting(ids, restored) >= 0)[0])  # nothing is expected in front of a text
    assert np.abs(said.sum(-1)[known] - 1).max() < 1e-5 and begun < 3
    assert known[0, begun : len(ids) - 1].all() and not known[1, 9:].any()
    text = [old.decode(restored[: i + 1]) for i in range(len(restored))]
    begins = [new.decode(ids[: place + 1]) for place in range(len(ids) - 1)]
    plain = [place for place, begin in enumerate(begins) if begin in text and (ids[place],) not in translation.longer]
    plain = [place for place in plain if begins[place - 1] in text]
    assert 0 < len(plain) < len(begins)
    for place in plain:
        wanted = translation.spoken(alone[[text.index(begins[place])]])[0]
        assert np.abs(said[0, place] - wanted).max() < 1e-4
    pieces = sum(np.log(said[0, place, ids[place + 1]]) for place in range(begun, len(ids) - 1))
    tokens = sum(np.log(alone[place, restored[place + 1]]) for place in range(len(restored) - 1))
    assert pieces >= tokens - 1e-3 and abs(pieces / tokens - 1) < 0.1


def test_texts_are_reworded_with_what_went(fewer, model):
    translation, old, _, _ = fewer
    gone, window = list(translation.spelled), old.encode(PROSE * 3)
    with open_session(model, backend="reference") as original:
        *_, made = _all(reworded(original.decoder, gone, [window], 5.0, seed=1))
        assert _all(reworded(original.decoder, gone, [window], 5.0, seed=1))[-1] == made
        assert _all(reworded(original.decoder, [], [window], 5.0))[-1] == [window]
        rarely = _changed(window, _all(reworded(original.decoder, gone, [window], 1.0, seed=1))[-1][0])
    changed = _changed(window, made[0])
    assert len(rarely) < len(changed) / 2
    assert len(window) / 20 < len(changed) and min(np.diff(changed)) > 1
    assert all(made[0][at] in translation.spelled for at in changed)


def _changed(one, other):
    return [at for at, pair in enumerate(zip(one, other, strict=True)) if len(set(pair)) > 1]


def _all(generator):
    found = []
    while True:
        try:
            found.append(next(generator))
        except StopIteration as end:
            return [*found, end.value]


def _whole(ids):
    from ondevice.backends.base import Step

    return Step.whole(1, len(ids))


def healed(source, dest, prose, steps, **options):
    *events, result = prune(source, dest, Options(heal=Lessons(prose, steps=steps, **QUICK), **options))
    told = [event for event in events if isinstance(event, Progress)]
    assert any(event.stage.startswith("Learning") for event in told)
    assert 1 <= sum(event.stage.startswith("Looking") and not event.done for event in told) <= VALIDATIONS
    assert not list(dest.parent.glob(".*.partial"))
    return result.healed


def test_layers_are_made_up_for(tmp_path, model, prose):
    made = healed(model, tmp_path / "out", prose, 40, drop_layers=(1,))
    assert made.after.kl < 0.8 * made.before.kl and made.steps == 40
    assert made.original.kl is None
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    ids = np.arange(20, dtype=np.int32)[None]
    with open_session(tmp_path / "out", backend="reference") as session:
        logits = session.backend.numpy(session.decoder(session.backend.array(ids), _whole(ids[0])))
    import torch

    assert np.abs(theirs(torch.tensor(ids)).logits.detach().numpy() - logits).max() < 1e-4


@pytest.mark.parametrize("shares", [(1.0,), (0.7,)])
def test_tokens_are_made_up_for(tmp_path, model, prose, monkeypatch, shares):
    """The embedding goes on being the head, however much of its training is worked in."""
    monkeypatch.setattr(teaching, "SHARES", shares)
    chosen = {"vocabulary": Amount(100), "calibration": prose, "length": 24}
    made = healed(model, tmp_path / "out", prose, 12, **chosen)
    assert made.after.bits_per_byte < made.before.bits_per_byte
    assert made.after.kl is None and made.share == shares[0]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 100
    with open_session(tmp_path / "out", backend="reference") as session:
        assert set(session.parameters) & {"embed", "head"} == {"embed"}


@pytest.mark.parametrize("given", [True, False], ids=["a text", "self"])
def test_a_text_is_learnt_as_it_stands_and_for_its_own_sake(tmp_path, model, prose, monkeypatch, given):
    """What the original says is learnt by its predictions alone, reworded with what went; what judges shows that no
    more often than is expected."""
    often, teachers, shown = [], [], []
    monkeypatch.setattr(healing, "reworded", lambda *given, **more: often.append(given[3]) or reworded(*given, **more))
    monkeypatch.setattr(teaching, "taught", _noting(teaching.taught, teachers, shown))
    lessons = Lessons(prose if given else None, steps=1, sampled=512, **QUICK)
    options = Options(vocabulary=Amount(100), calibration=prose, length=24, heal=lessons)
    list(prune(model, tmp_path / "out", options))
    assert often == ([1.0] if given else [healing.OFTEN, 1.0])
    assert [teacher.hard for teacher in teachers] == [teaching.TEXT if given else 0.0]
    with open_session(tmp_path / "out", backend="reference") as session:
        assert not given or all(session.tokenizer.decode(e.sequences[0].ids.tolist()) in PROSE * 3 for e in shown)


@pytest.mark.parametrize(
    ("steps", "minutes", "wanted", "written"),
    [(None, 5.0, 2048, 2048), (1, 5.0, 8 * 128, 8 * 128), (5, 5.0, 12 * 128, 12 * 128), (None, 1e-6, 2048, 16 * 64)],
)
def test_the_original_writes_no_more_than_will_be_learnt_from(model, monkeypatch, steps, minutes, wanted, written):
    """Nor for longer than half of the time."""
    asked = []
    monkeypatch.setattr(teaching, "samples", lambda *given: asked.append(given[2]) or samples(*given))
    lessons = Lessons(None, steps=steps, minutes=minutes, length=128, sampled=2048)
    with open_session(model, backend="reference") as session:
        *_, windows = _all(teaching._windows(lessons, session))
    assert asked == [wanted] and sum(map(len, windows)) == written


def _noting(taught, teachers, shown):
    """`taught`, whose teacher and examples are noted."""

    def noted(student, data, settings, teacher, lessons, work):
        teachers.append(teacher)
        shown.extend(data.train)
        return (yield from taught(student, data, settings, teacher, lessons, work))

    return noted


@pytest.mark.parametrize(
    ("losses", "share"), [((3e-6, 4e-6), 1.0), ((3e-6, 2e-6, 3e-6), 0.7), ((3e-6, 2e-6, 1e-6), 0.4)]
)
def test_as_much_is_worked_in_as_helps(tmp_path, model, prose, monkeypatch, losses, share):
    """losses: of each share, in order, as if they had been measured."""
    measured, left = teaching.quality, list(losses)

    def quality(session, text, stage, *more):
        found = yield from measured(session, text, stage, *more)
        return replace(found, kl=left.pop(0)) if stage.startswith("After") else found

    monkeypatch.setattr(teaching, "quality", quality)
    made = healed(model, tmp_path / "out", prose, 2, drop_layers=(1,))
    assert made.share == share and made.after.kl == min(losses) and not left
    left += [1e-6, 2e-6]
    healed(model, tmp_path / "whole", prose, 2, drop_layers=(1,))
    list(prune(model, tmp_path / "none", Options(drop_layers=(1,))))
    none, whole, out = (weights(tmp_path / name) for name in ("none", "whole", "out"))
    moved = max(np.abs(whole[name] - none[name]).max() for name in none)
    assert moved > 1e-3
    for name, values in none.items():
        assert np.abs(values + share * (whole[name] - values) - out[name]).max() < 1e-5


def weights(folder):
    with open_session(folder, backend="reference") as session:
        parameters = session.parameters
        return {name: np.array(to_float(parameters[name])) for name in parameters}


def test_what_healing_made_worse_is_left_as_pruned(tmp_path, model, prose):
    wild = Lessons(prose, steps=2, **(QUICK | {"learning_rate": 3.0}))
    *_, result = prune(model, tmp_path / "out", Options(drop_layers=(1,), heal=wild))
    assert result.healed.after.kl > result.healed.before.kl
    assert "left as pruned" in result.notes[0]
    *_, plain = prune(model, tmp_path / "plain", Options(drop_layers=(1,)))
    name = "model.safetensors"
    assert plain.notes == () and (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_quantized_layers_stay_quantized(tmp_path, model, prose, quantize_folder):
    source = quantize_folder(model, tmp_path / "in", {"": (8, 32)})
    made = healed(source, tmp_path / "out", prose, 40, drop_layers=(1,))
    assert made.after.kl < made.before.kl
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]["bits"] == 8


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"short", "passages of 24 tokens to learn from"),
        (b"\xff\xfe", "not UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_data_that_nothing_can_be_learnt_from(tmp_path, model, data, message):
    path = tmp_path / "data.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(OnDeviceError, match=message):
        list(prune(model, tmp_path / "out", Options(drop_layers=(1,), heal=Lessons(path, **QUICK))))
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--drop-layers", "1", "--heal-steps", "3"], "--heal-steps is for --heal"),
        (["--drop-layers", "1", "--heal", "self", "--heal-minutes", "0"], "are no time"),
        (["--sparsity", "50%", "--heal", "self"], "does not stay zero"),
    ],
)
def test_requests_that_make_no_sense(tmp_path, model, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        main(["prune", str(model), str(tmp_path / "out"), *options])
    assert stop.value.code and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_heals_by_what_the_model_says(tmp_path, model, capsys, monkeypatch):
    monkeypatch.setattr(Lessons, "__init__", _short(Lessons.__init__))
    with pytest.raises(SystemExit) as stop:
        main(["prune", str(model), str(tmp_path / "out"), "--drop-layers", "1", "--heal", "self", "--heal-steps", "2"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    assert "bits/byte" in told and "original" in told and "2 steps in" in told


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _until(work, stage, done):
    """What is told until then; the work is stopped there, as Ctrl-C does it."""
    told = []
    with closing(work):
        for event in work:
            told.append(event)
            if getattr(event, "stage", "").startswith(stage) and event.done == done:
                break
    return told


@pytest.mark.parametrize("stops", [[("Learning", 3)], [("Choosing", 0), ("Looking", 0), ("After", 0)]])
@pytest.mark.parametrize("given", [True, False], ids=["a text", "self"])
def test_what_was_interrupted_goes_on_to_the_same_bytes(tmp_path, model, prose, monkeypatch, given, stops):
    lessons = {"steps": 6, "sampled": 512, **QUICK}
    chosen = {"vocabulary": Amount(100), "channels": Amount(16), "calibration": prose, "length": 24}
    options = Options(heal=Lessons(prose if given else None, **lessons), **chosen)
    *_, whole = prune(model, tmp_path / "whole", options)
    for stage, done in stops:
        _until(prune(model, tmp_path / "out", options), stage, done)
        assert not (tmp_path / "out").exists() and (tmp_path / ".out.prune").is_dir()
    *events, result = prune(model, tmp_path / "out", options)
    learnt = [event.done for event in events if event.stage.startswith("Learning")]
    assert learnt == ([4, 5, 6] if stops[0][0] == "Learning" else [])
    assert not any(event.stage.startswith(("Choosing", "The original writes", "Putting in")) for event in events)
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")
    assert not (tmp_path / ".out.prune").exists()
    timeless = {"seconds": 0.0, "path": None}
    alike = [replace(r, healed=replace(r.healed, seconds=0.0), **timeless) for r in (result, whole)]
    assert alike[0] == alike[1]


@pytest.mark.parametrize("failing", ["fsync", "mkdir"])
@pytest.mark.parametrize(
    "command",
    [
        ["prune", "--drop-layers", "1"],
        ["prune", "--drop-layers", "1", "--heal", "{prose}", "--heal-steps", "1"],
        ["quantize", "--method", "rtn"],
        ["quantize", "--method", "distill", "--start", "rtn", "--calibration", "{prose}", "--steps", "1"],
    ],
    ids=lambda command: " ".join(command[:3]),
)
def test_a_full_disk_is_said_and_nothing_is_left(tmp_path, model, prose, capsys, monkeypatch, command, failing):
    def full(*given, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    name, *options = (part.format(prose=prose) for part in command)
    with pytest.raises(SystemExit) as stop:
        main([name, str(model), str(tmp_path / "out"), *options])
    monkeypatch.undo()
    told = capsys.readouterr().err
    assert stop.value.code == 1 and "could not be written: No space left on device." in told
    assert "Traceback" not in told and len(told.strip().splitlines()) == 2
    assert {path.name for path in tmp_path.iterdir()} <= {".out.quantize", ".out.prune"}


def test_a_folder_that_came_in_between_costs_nothing(tmp_path, model, prose):
    options = Options(drop_layers=(1,), heal=Lessons(prose, steps=2, **QUICK))
    with pytest.raises(OnDeviceError, match="out could not be made: ") as told:
        for event in prune(model, tmp_path / "out", options):
            if event.stage.startswith("Learning") and event.done == 1:
                (tmp_path / "out").mkdir()
                (tmp_path / "out" / "letter.txt").write_text("mine")
    assert str(tmp_path / ".out.prune") in told.value.hint
    (tmp_path / "out").rename(tmp_path / "letters")
    *events, result = prune(model, tmp_path / "out", options)
    assert result.path == tmp_path / "out" and not [e for e in events if e.stage.startswith("Learning")]
    assert {path.name for path in tmp_path.iterdir()} == {"out", "letters"}


def _short(init):
    """Healing whose own text is short: a small model writes nonsense all the same."""
    return lambda self, data=None, **given: init(self, data, sampled=256, length=16, **given)
