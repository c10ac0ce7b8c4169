"""prune: vocabularies cut without a change to what is left; smaller models that run everywhere; bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ondevice.backends.base import Step
from ondevice.cli import main
from ondevice.errors import BadOption, OnDeviceError
from ondevice.runtime.session import open_session
from ondevice.runtime.tokenizer import load_tokenizer
from ondevice.tools.prune import Amount, Options, Result, prune
from tests.tools.wide_models import LLAMA, write_model

TEXTS = [
    "the and thetheand",
    " on the in",
    "Zebra 12 ünïcödé\n\n\tx",
    "<|im_start|>user\nhi<|im_end|>",
    "",
    "  ",
    "{}!\\",
]


def pruned(source, dest, **options) -> Result:
    *_, result = prune(source, dest, Options(**options))
    return result


def logits(path, ids, backend="reference"):
    with open_session(path, backend=backend, exact=True) as session:
        ops = session.backend
        return np.array(ops.numpy(session.decoder(ops.array(ids), Step.whole(*ids.shape))))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the and in the other hand " * 40)
    return path


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(tmp_path, request):
    return write_model(tmp_path / "in", LLAMA | {"tie_word_embeddings": request.param}, "float32")


def old_ids(source, dest) -> np.ndarray:
    """The old id of each new one."""
    old, new = load_tokenizer(source), load_tokenizer(dest)
    return np.array([old.vocabulary.ids[text] for text in new.vocabulary.texts])


@pytest.mark.parametrize(("backend", "tolerance"), [("cpu", 0), ("reference", 1e-6)])
def test_logits_of_kept_tokens_do_not_change(tmp_path, model, text, backend, tolerance):
    """The reference multiplies by BLAS, which adds up otherwise at the edge of a matrix that fills no whole tile."""
    result = pruned(model, tmp_path / "out", vocabulary=Amount(104), calibration=text, length=16)
    kept = old_ids(model, tmp_path / "out")
    assert result.sizes["tokens"] == (106, 104)
    assert len(kept) == 104
    ids = np.array([[3, 50, 60, 103, 20, 7, 1]], np.int32)
    before, after = logits(model, kept[ids].astype(np.int32), backend), logits(tmp_path / "out", ids, backend)
    assert np.abs(before[..., kept] - after).max() <= tolerance


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_logits_of_the_real_model_do_not_change_by_a_bit(tmp_path, smollm2_gguf, backend):
    (tmp_path / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 9)
    chosen = {"vocabulary": Amount(16384), "calibration": tmp_path / "text.txt", "tokens": 64, "length": 32}
    pruned(smollm2_gguf, tmp_path / "out", **chosen)
    with open_session(smollm2_gguf, backend="reference") as session:
        old = session.tokenizer.vocabulary.ids
    kept = np.array([old[text] for text in load_tokenizer(tmp_path / "out").vocabulary.texts])
    ids = np.arange(30, 38, dtype=np.int32)[None]
    before = logits(smollm2_gguf, kept[ids].astype(np.int32), backend)
    assert np.array_equal(before[..., kept], logits(tmp_path / "out", ids, backend))


def test_every_text_encodes_and_decodes_as_before(tmp_path, model, text):
    pruned(model, tmp_path / "out", vocabulary=Amount(103), calibration=text, length=16)
    old, new = load_tokenizer(model), load_tokenizer(tmp_path / "out")
    kept = old_ids(model, tmp_path / "out")
    assert new.vocab_size < old.vocab_size
    for sample in [*TEXTS, text.read_text()]:
        ids, wanted = new.encode(sample), old.encode(sample)
        assert new.decode(ids, skip_special=False) == old.decode(wanted, skip_special=False)
        if set(wanted) <= set(kept.tolist()):
            assert kept[ids].tolist() == wanted
    assert new.eos_token == old.eos_token
    assert new.special_texts == old.special_texts
    assert {new.vocabulary.texts[id] for id in new.eos_ids} == {old.vocabulary.texts[id] for id in old.eos_ids}


def test_transformers_reads_what_was_cut(tmp_path, model, text):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pruned(model, tmp_path / "out", vocabulary=Amount(103), calibration=text, length=16)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = load_tokenizer(tmp_path / "out")
    for sample in TEXTS:
        assert theirs.encode(sample) == ours.encode(sample)
    chat = [{"role": "user", "content": "the end"}]
    with open_session(tmp_path / "out", backend="reference") as session:
        assert theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] == session.encode_messages(
            chat
        )
    ids = np.arange(100, dtype=np.int32)[None]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    wanted = loaded(torch.tensor(ids)).logits.detach().numpy()
    assert np.abs(wanted - logits(tmp_path / "out", ids)).max() < 1e-4


def test_ids_that_files_name_are_renumbered(tmp_path, model, text):
    config = json.loads((model / "config.json").read_text())
    end = load_tokenizer(model).vocabulary.ids["<|im_end|>"]
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": end, "pad_token_id": -1}))
    named = {"eos_token_id": [end, end - 1], "suppress_tokens": [98, end], "temperature": 0.5}
    (model / "generation_config.json").write_text(json.dumps(named))
    pruned(model, tmp_path / "out", vocabulary=Amount(102), calibration=text, length=16)
    new = load_tokenizer(tmp_path / "out").vocabulary.ids
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [new["<|im_end|>"], new["<|im_start|>"]]
    assert generation["temperature"] == 0.5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"], config["vocab_size"]) == (new["<|im_end|>"], -1, 102)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary": Amount(50)}, "bytes, special tokens and the chat template alone need"),
        ({"vocabulary": Amount(106)}, "this model has 106 tokens, no more"),
    ],
)
def test_bad_requests_are_refused(tmp_path, model, text, options, message):
    with pytest.raises(OnDeviceError, match=message):
        pruned(model, tmp_path / "out", calibration=text, length=16, **options)
    assert not (tmp_path / "out").exists()


def test_nothing_asked_for_is_refused():
    with pytest.raises(BadOption, match="Nothing is asked for"):
        Options()


def test_an_existing_folder_is_left_alone(tmp_path, model, text):
    (tmp_path / "out").mkdir()
    with pytest.raises(OnDeviceError, match="exists already"):
        pruned(model, tmp_path / "out", keep_vocabulary=text)


def test_other_kinds_of_tokenizers_are_refused(tmp_path, model, text):
    data = json.loads((model / "tokenizer.json").read_text())
    data["model"] = {"type": "WordLevel", "unk_token": "a", "vocab": data["model"]["vocab"]}
    (model / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(OnDeviceError, match="WordLevel"):
        pruned(model, tmp_path / "out", keep_vocabulary=text)


def test_the_command(tmp_path, model, text, capsys):
    common = ["prune", str(model), "--vocabulary", "103", "--calibration", str(text)]
    with pytest.raises(SystemExit) as stop:
        main([*common, "--dry-run", "--json"])
    assert stop.value.code == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["path"] is None and facts["sizes"]["tokens"] == [106, 103]
    with pytest.raises(SystemExit) as stop:
        main([*common, str(tmp_path / "out")])
    assert stop.value.code == 0
    assert "106 -> 103" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(common)
    assert stop.value.code == 2
    assert "There is no DEST" in capsys.readouterr().err
