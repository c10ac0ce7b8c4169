"""Tasks through lm-evaluation-harness: the same numbers as its own class for transformers gives, on local data."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from ondevice.backends.base import SamplingParams, Step
from ondevice.errors import BadOption, Unavailable
from ondevice.runtime.engine import GenerateOptions, Token
from ondevice.runtime.session import open_session
from ondevice.tools.evaluate.batch import generate, score
from ondevice.tools.evaluate.text import log_softmax
from tests.tiny_model import write_tiny_model

QUESTIONS = [
    {"question": "the end of the day", "choices": [" and", " the rain", "then"], "answer": 0},
    {"question": "in the", "choices": [" a", " b", " c"], "answer": 2},
    {"question": "on and on", "choices": [" on and then", " the", " in"], "answer": 1},
    {"question": "a", "choices": [" longer answer than the question", " b", " c"], "answer": 1},
]
KINDS = {
    "choices": ["output_type: multiple_choice", "doc_to_choice: '{{choices}}'", "doc_to_target: answer"],
    "answers": ["output_type: generate_until", "doc_to_target: '{{choices[answer]}}'"],
    "rolling": ["output_type: loglikelihood_rolling", "doc_to_target: '{{question}}, {{choices[0]}}'"],
}
METRICS = {"choices": ["acc", "acc_norm"], "answers": ["exact_match"], "rolling": ["bits_per_byte", "word_perplexity"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, and a task of each kind over local data."""
    root = tmp_path_factory.mktemp("tasks")
    write_tiny_model(root / "model", context=40)
    (root / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS))
    for name, lines in KINDS.items():
        text = "" if name == "rolling" else "Q: {{question}} A:"
        made = [f"task: {name}", "dataset_path: json", "test_split: test", f"doc_to_text: '{text}'", *lines]
        made += ["dataset_kwargs:", "  data_files:", f"    test: {root / 'data.jsonl'}"]
        made += ["metric_list:", *(f"  - metric: {metric}" for metric in METRICS[name])]
        if name == "answers":
            made += ["generation_kwargs:", "  until: ['e']", "  max_gen_toks: 9"]
        (root / f"{name}.yaml").write_text("\n".join(made) + "\n")
    return root


@pytest.fixture(scope="module")
def session(folder):
    with open_session(folder / "model", backend="reference", exact=True) as opened:
        yield opened


# ------------------------------------------------------------------------------------------------ batches


def alone(session, ids):
    """Log-probabilities behind every id."""
    ops = session.backend
    hidden = session.decoder(ops.array(np.array([ids], np.int32)), Step.whole(1, len(ids)))
    return log_softmax(np.array(ops.numpy(hidden))[0])


@pytest.mark.parametrize("batch_tokens", [1, 16, 2048])
def test_scores_are_those_of_each_pair_alone(session, batch_tokens):
    draw = np.random.default_rng(0)
    shared = draw.integers(100, size=7).tolist()
    pairs = [(shared, [i]) for i in range(3)] + [(shared, [5, 6]), (shared[:2], [9, 8, 7, 6])]
    likeliest = int(alone(session, shared)[-1].argmax())
    pairs.append((shared, [likeliest]))
    pairs += [(draw.integers(100, size=n).tolist(), draw.integers(100, size=m).tolist()) for n, m in ((1, 1), (20, 9))]
    found = dict(score(session.decoder, pairs, batch_tokens))
    assert sorted(found) == list(range(len(pairs)))
    for i, (context, continuation) in enumerate(pairs):
        logprobs = alone(session, [*context, *continuation[:-1]])[-len(continuation) :]
        wanted = logprobs[np.arange(len(continuation)), continuation].sum()
        assert found[i].logprob == pytest.approx(wanted, abs=1e-3)
        assert found[i].greedy == bool((logprobs.argmax(-1) == continuation).all())
    assert found[5].greedy


def test_what_pairs_share_is_computed_once(session, monkeypatch):
    widths = []
    hidden = session.decoder.hidden
    monkeypatch.setattr(
        session.decoder, "hidden", lambda ids, step: widths.append(len(step.lengths)) or hidden(ids, step)
    )
    list(score(session.decoder, [([1, 2, 3], [i]) for i in range(50)]))
    assert widths == [1]


def test_rows_are_continued_as_the_engine_would(session):
    prompts = [[1, 2, 3], [4] * 12, [9, 8]]
    stops = frozenset({7})
    found = generate(session.decoder, prompts, 10, stops)
    for prompt, answer in zip(prompts, found, strict=True):
        events = session.engine.generate(prompt, GenerateOptions(max_tokens=10, stop_ids=stops))
        ids = [event.id for event in events if isinstance(event, Token)]
        assert answer == [id for id in ids if id not in stops]


def test_a_row_may_be_stopped_and_the_others_go_on(session):
    whole = generate(session.decoder, [[1, 2], [3, 4]], 8, frozenset())
    cut = generate(session.decoder, [[1, 2], [3, 4]], 8, frozenset(), stopped=lambda row, id: row == 0)
    assert cut == [whole[0][:1], whole[1]]


def test_draws_depend_on_the_seed_alone(session):
    warm = SamplingParams(temperature=1.0)
    one, same, other = (generate(session.decoder, [[1], [1]], 12, frozenset(), warm, seed) for seed in (1, 1, 2))
    assert one == same != other and one[0] != one[1]


# ------------------------------------------------------------------------------------------------ the harness


def test_the_numbers_are_those_of_transformers(folder, session):
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM

    from ondevice.tools.evaluate.tasks import TaskOptions, _measures, run_tasks

    files = [str(folder / f"{name}.yaml") for name in KINDS]
    seen = []
    ours = run_tasks(session, files, TaskOptions(), lambda what, done, total: seen.append((what, done, total)))
    theirs = HFLM(pretrained=str(folder / "model"), dtype="float32", device="cpu", batch_size=2, max_length=40)
    found = lm_eval.simple_evaluate(theirs, tasks=files, log_samples=False, bootstrap_iters=1000)
    wanted = {(m.task, m.metric): m.value for m in _measures(found)}
    assert {(m.task, m.metric): m.value for m in ours} == pytest.approx(wanted, rel=1e-4)
    assert {metric for _, metric in wanted} > {"acc", "acc_norm", "exact_match", "bits_per_byte"}
    assert all(m.documents == 4 for m in ours) and ("Scoring", 12, 12) in seen and ("Answering", 4, 4) in seen


def test_requests_are_answered_as_by_transformers(folder, session):
    """Long contexts, empty ones, whole documents beyond the context, stops within an answer."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM

    from ondevice.tools.evaluate.harness import OnDeviceLM

    class Request:
        def __init__(self, *args):
            self.args = args

    ours = OnDeviceLM(session, batch_size=3)
    theirs = HFLM(pretrained=str(folder / "model"), dtype="float32", device="cpu", batch_size=2, max_length=40)
    long = "the end of the day and then on and on in the rain " * 4
    asked = (("in the", " rain"), ("", "then"), (long, " and"), ("a ", " b"), ("a", " longer"))
    pairs = [Request(*pair) for pair in asked]
    for (one, greedy), (other, same) in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        assert one == pytest.approx(other, rel=1e-4) and greedy == same
    texts = [Request(text) for text in ("short", long, "x")]
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-4)
    kinds = [{"until": ["e"], "max_gen_toks": 9}, {"until": [], "max_gen_toks": 5}]
    asked = [Request(text, kinds[i % 2]) for i, text in enumerate(["in the", "a", "on and", "b", long])]
    assert ours.generate_until(asked) == theirs.generate_until(asked)
    assert any(ours.generate_until(asked))


def test_an_empty_question_is_answered_as_a_text_begins(session):
    pytest.importorskip("lm_eval")
    from ondevice.tools.evaluate.harness import OnDeviceLM

    ours = OnDeviceLM(session)
    asked = SimpleNamespace(args=("", {"until": [], "max_gen_toks": 5}))
    (answer,) = generate(session.decoder, [[ours.prefix_token_id]], 5, frozenset({ours.eot_token_id}))
    assert ours.generate_until([asked]) == [session.tokenizer.decode(answer)]


def test_what_the_harness_cannot_fetch_is_said(session, folder, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    from ondevice.tools.evaluate.tasks import run_tasks

    def fails(*_, **__):
        raise ConnectionError

    monkeypatch.setattr(lm_eval, "simple_evaluate", fails)
    with pytest.raises(Unavailable, match="cannot be had: ConnectionError"):
        run_tasks(session, [str(folder / "choices.yaml")])


def test_unknown_tasks_are_named(session, folder):
    pytest.importorskip("lm_eval")
    from ondevice.tools.evaluate.tasks import run_tasks

    with pytest.raises(BadOption, match=r"no task file .*nothing\.yaml"):
        run_tasks(session, [str(folder / "nothing.yaml")])
    (folder / "broken.yaml").write_text("task: broken\noutput_type: nonsense\n")
    with pytest.raises(BadOption, match="fails on"):
        run_tasks(session, [str(folder / "broken.yaml")])


def command_line(folder, *args):
    line = [sys.executable, "-m", "ondevice", "eval", "model", "--backend", "reference", *args]
    done = subprocess.run(line, capture_output=True, text=True, timeout=180, check=False, cwd=folder)
    assert "Traceback" not in done.stderr
    return done


def test_the_command(folder):
    pytest.importorskip("lm_eval")
    done = command_line(folder, "--tasks", "choices.yaml", "--limit", "3", "--json")
    assert done.returncode == 0, done.stderr
    measures = json.loads(done.stdout)["measures"]
    assert [(m["task"], m["metric"], m["documents"]) for m in measures] == [
        ("choices", "acc", 3), ("choices", "acc_norm", 3),
    ]  # fmt: skip


@pytest.mark.parametrize("args", [[], ["--tasks", "x", "--plot", "a.png"], ["--limit", "3", "--text", "data.jsonl"]])
def test_text_and_tasks_do_not_mix(folder, args):
    done = command_line(folder, *args)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 2
