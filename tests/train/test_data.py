"""Lines into ids and masks; and what is wrong with a line is said, with its place."""

from __future__ import annotations

import numpy as np
import pytest

from ondevice.errors import OnDeviceError, Unsupported
from ondevice.runtime.session import open_session
from ondevice.train import Encoded, Settings, load_data
from ondevice.train import encode as encoding
from ondevice.train.batches import batches_of, make_batch, rows_of, steps_of_rows
from tests.tiny_model import CHATML, write_tiny_model

from .conftest import chat, sums, write_lines

THINKING = (  # shows thoughts of the last answer only, as Qwen 3's does
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENED = CHATML.replace("assistant\n'", "assistant\n<think>\n'")  # a prompt ends in an opened thought
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


@pytest.fixture
def other(tmp_path):
    """template -> a session of the tiny model with it"""
    opened = []

    def make(template):
        model = write_tiny_model(tmp_path / f"model{len(opened)}", template)
        opened.append(open_session(model, backend="cpu", exact=True))
        return opened[-1]

    yield make
    for session in opened:
        session.close()


def learnt(session, sequence: Encoded) -> list[str]:
    """The runs of ids that are learnt, as text."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sequence.learnt.astype(np.int8), [0]])))
    return [
        session.tokenizer.decode(sequence.ids[a:b], skip_special=False)
        for a, b in zip(edges[::2], edges[1::2], strict=True)
    ]


def one(session, line, max_length=512) -> Encoded:
    (sequence,) = encoding.example(session, line, max_length)
    return sequence


def test_answers_are_learnt_with_their_end(session):
    messages = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]  # fmt: skip
    sequence = one(session, {"messages": messages})
    assert learnt(session, sequence) == ["two<|im_end|>", "four<|im_end|>"]
    assert sequence.ids.tolist() == session.encode_messages(messages, add_generation_prompt=False)


def test_a_question_at_the_end_is_left_out(session):
    line = chat("one", "two")
    line["messages"].append({"role": "user", "content": "three"})
    sequence = one(session, line)
    assert learnt(session, sequence) == ["two<|im_end|>"]
    assert "three" not in session.tokenizer.decode(sequence.ids)


def test_a_template_that_changes_earlier_text_is_learnt_turn_by_turn(other):
    session = other(THINKING)
    messages = [*chat("one", "a</think>two")["messages"], *chat("three", "b</think>four")["messages"]]
    first, second = encoding.example(session, {"messages": messages}, 512)
    assert learnt(session, first) == ["a</think>two<|im_end|>"]
    assert learnt(session, second) == ["b</think>four<|im_end|>"]
    assert "a</think>" not in session.tokenizer.decode(second.ids), "the model will not see its old thoughts"


def test_a_prompt_that_opens_a_thought(other):
    session = other(OPENED)
    assert learnt(session, one(session, chat("one", "two"))) == ["two<|im_end|>"]


def test_what_looks_like_a_special_token_stays_text(session):
    sequence = one(session, chat("<|im_end|>", "a<|im_end|>b"))
    end = session.tokenizer.vocabulary.ids["<|im_end|>"]
    assert (sequence.ids == end).sum() == 2
    assert sequence.learnt[np.flatnonzero(sequence.ids == end)].tolist() == [False, True]


def test_prompt_and_completion(session):
    sequence = one(session, {"prompt": "one and", "completion": " the other"})
    assert learnt(session, sequence) == [" the other<|im_end|>"]
    assert sequence.ids[: (~sequence.learnt).sum()].tolist() == session.encode_prompt("one and")


def test_prompt_and_completion_as_messages(session):
    line = {"prompt": [{"role": "user", "content": "one"}], "completion": [{"role": "assistant", "content": "two"}]}
    assert learnt(session, one(session, line)) == ["two<|im_end|>"]


def test_a_long_text_is_cut_and_nothing_lost(session):
    text = "the cat and the dog " * 20
    pieces = encoding.example(session, {"text": text}, 32)
    assert all(p.length <= 32 for p in pieces) and len(pieces) > 3
    joined = np.concatenate([p.ids for p in pieces])
    assert session.tokenizer.decode(joined) == text


def test_tool_calls_are_learnt(other):
    session = other(
        "{% for t in tools or [] %}{{ t['function']['name'] }}\n{% endfor %}{% for m in messages %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% for c in m.tool_calls or [] %}"
        "{{ c['function']['name'] + c['function']['arguments'] }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "1 and 2?"}, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3"}, {"role": "assistant", "content": "3."},
    ]  # fmt: skip
    sequence = one(session, {"messages": messages, "tools": [{"type": "function", "function": {"name": "add"}}]})
    assert learnt(session, sequence) == ['add{"a": 1}<|im_end|>', "3.<|im_end|>"]


def test_tools_that_a_template_passes_over(session):
    """Nothing is learnt from an answer that would be shown empty."""
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    asked = {"role": "user", "content": "1 and 2?"}
    with pytest.raises(Unsupported, match="does not show tool calls"):
        one(session, {"messages": [asked, {"role": "assistant", "content": "", "tool_calls": [call]}]})
    with pytest.raises(Unsupported, match="does not show tools"):
        one(session, {"messages": [asked, {"role": "assistant", "content": "3."}], "tools": [{"type": "function"}]})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"massages": []}', "only the fields 'massages'"),
        ('{"messages": []}', "no list of messages"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "nothing to learn"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "unknown role 'robot'"),
        ('{"messages": [{"content": "x"}]}', "message 1 has no role"),
        ('{"messages": [{"role": "user", "content": 3}]}', "message 1 has no content"),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}', "message 2 has no"),
        ('{"prompt": "a", "completion": 3}', "'completion' is no text"),
        ('{"prompt": "a", "completion": ""}', "'completion' is empty"),
        ('{"text": ""}', "'text' is empty"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "this is a preference"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_a_bad_line_is_named(session, tmp_path, line, reason):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a good line"}\n\n' + line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(OnDeviceError) as told:
        load_data(path, session, 64)
    assert reason in told.value.message and f"{path}:3" in told.value.message
    assert told.value.hint and "\n" not in told.value.message + told.value.hint


def test_a_byte_order_mark_is_no_part_of_the_first_line(session, tmp_path):
    """Windows' editors put one in front."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a good line"}\r\n{"text": "another"}\r\n')
    assert len(load_data(path, session, 64, validation=0).train) == 2


def test_a_template_without_the_role(other, tmp_path):
    session = other(STRICT)
    line = {"messages": [{"role": "system", "content": "x"}, *chat("one", "two")["messages"]]}
    path = write_lines(tmp_path / "data.jsonl", [chat("one", "two"), line])
    with pytest.raises(OnDeviceError, match=r"data.jsonl:2.*no system role"):
        load_data(path, session, 64)


def test_a_model_without_a_template(other, tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [chat("one", "two")])
    with pytest.raises(OnDeviceError, match="no chat template"):
        load_data(path, other(None), 64)


@pytest.mark.parametrize(
    ("files", "reason"),
    [({}, "There is no data"), ({"other.jsonl": []}, "no train.jsonl"), ({"train.jsonl": []}, "holds no example")],
)
def test_no_data(session, tmp_path, files, reason):
    for name, lines in files.items():
        write_lines(tmp_path / "data" / name, lines)
    with pytest.raises(OnDeviceError, match=reason):
        load_data(tmp_path / "data", session, 64)


def test_long_examples_are_cut_and_counted(session, tmp_path):
    lines = [chat("a", "b"), chat("a", "the cat " * 40), chat("the cat " * 40, "b")]
    data = load_data(write_lines(tmp_path / "data.jsonl", lines), session, 64, validation=0)
    assert (len(data.train), data.truncated, data.dropped) == (2, 2, 1)
    assert max(e.length for e in data.train) == 64
    with pytest.raises(OnDeviceError, match="holds no example") as told:
        load_data(write_lines(tmp_path / "long.jsonl", lines[2:]), session, 64)
    assert "--max-length" in told.value.hint


def test_splits(session, tmp_path):
    folder = tmp_path / "data"
    write_lines(folder / "train.jsonl", sums(4))
    alone = load_data(folder, session, 64)
    assert alone.held_out and (len(alone.train), len(alone.valid)) == (15, 1)
    again = load_data(folder, session, 64)
    assert [e.source for e in again.valid] == [e.source for e in alone.valid]
    write_lines(folder / "valid.jsonl", sums(2))
    given = load_data(folder, session, 64)
    assert not given.held_out and (len(given.train), len(given.valid)) == (16, 4)
    assert given.digest != alone.digest


def test_one_example_is_enough(session, tmp_path):
    data = load_data(write_lines(tmp_path / "data.jsonl", sums(1)), session, 64)
    assert (len(data.train), len(data.valid)) == (1, 0)


def test_every_example_once_an_epoch_and_never_the_same_order(session, data_file):
    data = load_data(data_file, session, 64, validation=0)
    settings = Settings(batch_size=3, accumulate=2)
    epochs = [[i for row in rows_of(data.train, settings, e) for i in row] for e in (0, 1)]
    assert all(sorted(order) == list(range(len(data.train))) for order in epochs)
    assert epochs[0] != epochs[1]
    steps = steps_of_rows(data.train, settings)
    gone = [next(steps) for _ in range(20)]
    assert next(steps_of_rows(data.train, settings, 13)) == gone[13], "a resumed run sees what it would have seen"


def test_packing_fills_rows_and_keeps_documents_apart(session, data_file):
    data = load_data(data_file, session, 128, validation=0)
    settings = Settings(pack=True, max_length=256)
    rows = rows_of(data.train, settings, 0)
    assert sorted(i for row in rows for i in row) == list(range(len(data.train)))
    batch = make_batch(data.train, rows[:2])
    assert batch.tokens > 0.75 * 2 * 256 and batch.ids.shape[1] <= 256
    assert batch.step.segments.max() >= 2
    assert batch.learnt == sum(data.train[i].sequences[0].learnt[1:].sum() for row in rows[:2] for i in row)


def test_packed_losses_are_those_apart(session, data_file):
    from ondevice.train.learner import Learner
    from ondevice.train.methods import make_method

    data = load_data(data_file, session, 128, validation=0)
    settings = Settings(pack=True, max_length=256)
    learner = Learner(make_method(session, settings))
    row = rows_of(data.train, settings, 0)[0]
    packed = learner.losses({}, make_batch(data.train, [row]))
    apart = np.concatenate([learner.losses({}, b) for b in batches_of(data.train, [[i] for i in row], 1)])
    np.testing.assert_allclose(packed, apart, atol=2e-5)


def test_hugging_face_datasets(session, tmp_path):
    datasets = pytest.importorskip("datasets")
    splits = {"train": sums(3), "validation": sums(2)}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_list(lines) for name, lines in splits.items()})
    saved.save_to_disk(tmp_path / "saved")
    data = load_data(tmp_path / "saved", session, 64)
    assert (len(data.train), len(data.valid), data.held_out) == (9, 4, False)
    assert data.train[3].source == f"{tmp_path / 'saved'}[train]:4"
    same = load_data(write_lines(tmp_path / "same.jsonl", sums(3)), session, 64, validation=0)
    assert all((a.sequences[0].ids == b.sequences[0].ids).all() for a, b in zip(data.train, same.train, strict=True))


def test_datasets_without_the_package(session, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(OnDeviceError, match="need the package datasets"):
        load_data("hf:owner/name", session, 64)


@pytest.mark.parametrize("count", [1, 2])
def test_something_is_left_to_learn_from(count, session, tmp_path):
    lines = [{"text": f"the cat {i} and on"} for i in range(count)]
    data = load_data(write_lines(tmp_path / "data.jsonl", lines), session, 64, validation=0.9)
    assert (len(data.train), len(data.valid)) == (1, count - 1)
