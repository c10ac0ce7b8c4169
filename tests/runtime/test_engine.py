"""The engine: what it answers, what it reuses, and that nothing that stops it leaves a false cache."""

import math
from dataclasses import replace

import numpy as np
import pytest

from ondevice.backends.base import SamplingParams
from ondevice.backends.reference import HostCache
from ondevice.errors import BadFile, BadOption, ContextFull
from ondevice.models.config import ModelConfig
from ondevice.models.decoder import Decoder
from ondevice.models.random import random_weights
from ondevice.registry import create_backend
from ondevice.runtime import engine as module
from ondevice.runtime.engine import Engine, Finished, GenerateOptions, Prefilled, Token
from ondevice.testing.scripted import ScriptedDecoder

CONFIG = ModelConfig.llama_like({
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50,
    "intermediate_size": 48, "max_position_embeddings": 200,
})  # fmt: skip
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
RANDOM = GenerateOptions(12, SamplingParams(temperature=1.5), seed=5)


class Meddling:
    """A backend that does as another one, but may claim to be asynchronous, and can be interrupted: Ctrl-C comes with
    the `until`-th operation."""

    def __init__(self, ops, asynchronous=False, until=-1):
        self.ops, self.asynchronous, self.until, self.calls = ops, asynchronous, until, 0

    def __getattr__(self, name):
        found = getattr(self.ops, name)
        if not callable(found):
            return found

        def operation(*args, **options):
            self.calls += 1
            if self.calls == self.until:
                raise KeyboardInterrupt
            return found(*args, **options)

        return operation


def decoder(asynchronous=False):
    ops = create_backend("reference")
    made = Decoder(CONFIG, ops, random_weights(CONFIG, ops, 32))
    made.ops = Meddling(ops, asynchronous)
    return made


@pytest.fixture(scope="module")
def model():
    return decoder()


def tokens(events):
    return [e.id for e in events if isinstance(e, Token)]


def answer(model, prompt, options=RANDOM, capacity=64):
    return tokens(Engine(model, capacity).generate(prompt, options))


def closed_behind(model, place):
    """An engine whose answer nobody listened to any longer behind `place` events."""
    engine = Engine(model, 64)
    events = engine.generate(PROMPT, RANDOM)
    for _ in range(place):
        next(events)
    events.close()
    return engine


# ---- what is answered


def test_an_answer_is_prefilled_then_tokens_then_finished():
    engine = Engine(ScriptedDecoder.saying(3, [7, 8, 9]), 20)
    first, *middle, last = engine.generate([1, 2, 3], GenerateOptions(3))
    assert isinstance(first, Prefilled) and (first.tokens, first.reused) == (3, 0)
    assert tokens(middle) == [7, 8, 9]
    assert isinstance(last, Finished) and (last.reason, last.tokens) == ("length", 3)


def test_a_stop_id_ends_the_answer_and_belongs_to_it():
    engine = Engine(ScriptedDecoder.saying(3, [7, 8, 9, 4]), 20)
    *events, last = engine.generate([1, 2, 3], GenerateOptions(10, stop_ids=frozenset({9, 30})))
    assert tokens(events) == [7, 8, 9] and last.reason == "stop"


@pytest.mark.parametrize(
    ("capacity", "asked", "said", "reason"),
    [(8, None, 6, "context"), (8, 6, 6, "length"), (8, 7, 6, "context"), (3, None, 1, "context")],
)
def test_the_context_bounds_prompt_and_answer(capacity, asked, said, reason):
    engine = Engine(ScriptedDecoder.saying(3, [7]), capacity)
    *events, last = engine.generate([1, 2, 3], GenerateOptions(asked))
    assert (len(tokens(events)), last.reason) == (said, reason)


def test_a_prompt_longer_than_the_context_is_refused_and_changes_nothing():
    engine = Engine(ScriptedDecoder.saying(3, [7]), 8)
    list(engine.generate([1, 2, 3], GenerateOptions(2)))
    with pytest.raises(ContextFull, match=r"9 tokens.* 8"):
        list(engine.generate(range(9), GenerateOptions(2)))
    assert engine.held == [1, 2, 3, 7]


@pytest.mark.parametrize("prompt", [[], [50], [-1]])
def test_prompts_that_are_none(model, prompt):
    with pytest.raises(BadOption):
        list(Engine(model, 8).generate(prompt, GenerateOptions(2)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1}, {"top_p": 0.0},
        {"top_p": 1.5}, {"top_p": math.nan}, {"min_p": 1.1}, {"min_p": -0.1}, {"repetition": 0.0},
        {"repetition": math.nan}, {"presence": math.inf}, {"frequency": math.nan}, {"top_logprobs": -1},
    ],
)  # fmt: skip
def test_sampling_that_makes_no_sense(wrong):
    with pytest.raises(BadOption, match=next(iter(wrong))):
        GenerateOptions(sampling=SamplingParams(**wrong))


def test_other_options_that_make_no_sense(model):
    for wrong in ({"max_tokens": 0}, {"logit_bias": ((1, math.nan),)}, {"logit_bias": ((1, math.inf),)}):
        with pytest.raises(BadOption):
            GenerateOptions(**wrong)
    with pytest.raises(BadOption, match="bias"):
        list(Engine(model, 8).generate(PROMPT, GenerateOptions(2, logit_bias=((50, 1.0),))))


def test_predictions_that_are_no_numbers_are_no_answer():
    """A damaged weight makes all of them NaN, of which any token is as likely as another."""
    broken = decoder()
    head = broken.head
    broken.head = lambda *given: head(*given) * np.float32("nan")
    with pytest.raises(BadFile, match="predictions are NaN"):
        answer(broken, PROMPT)


def test_same_seed_same_tokens(model):
    assert answer(model, PROMPT) == answer(model, PROMPT)
    assert answer(model, PROMPT) != answer(model, PROMPT, replace(RANDOM, seed=6))


def test_a_bias_forbids_and_forces(model):
    greedy = GenerateOptions(6)
    first = answer(model, PROMPT, greedy)[0]
    assert first not in answer(model, PROMPT, replace(greedy, logit_bias=((first, -math.inf),)))
    assert answer(model, PROMPT, replace(greedy, logit_bias=((11, 1e4),))) == [11] * 6


def test_penalties_see_prompt_and_answer():
    """The script likes 7 best, then 8, then 9, by small steps."""
    logits = np.zeros(64, np.float32)
    logits[[7, 8, 9]] = [3.0, 2.9, 2.8]
    said = {}
    for name, value in (("repetition", 2.0), ("presence", 1.0), ("frequency", 0.15)):
        options = GenerateOptions(4, SamplingParams(**{name: value}))
        said[name] = answer(ScriptedDecoder(lambda ids: logits), [7, 1], options)
    assert said["repetition"] == [8, 9, 7, 7]  # the prompt's 7 counts; halved, all three keep their order
    assert said["presence"] == [7, 8, 9, 7]
    assert said["frequency"] == [7, 8, 7, 9]  # 3.0, 2.9, 2.85, 2.8


def test_top_logprobs_are_those_of_the_raw_logits(model):
    options = GenerateOptions(3, SamplingParams(temperature=2.0, top_logprobs=50), seed=1)
    for token in list(Engine(model, 64).generate(PROMPT, options))[1:-1]:
        assert sum(math.exp(p) for _, p in token.top) == pytest.approx(1, abs=1e-5)
        assert dict(token.top)[token.id] == pytest.approx(token.logprob)
        assert [p for _, p in token.top] == sorted((p for _, p in token.top), reverse=True)


def test_a_long_prompt_goes_in_chunks(model, monkeypatch):
    prompt = [i * 7 % 50 for i in range(41)]
    whole = answer(model, prompt)
    for chunk in (1, 4, 40, 41):
        monkeypatch.setattr(module, "PREFILL_CHUNK", chunk)
        assert answer(model, prompt) == whole


# ---- what is reused


def test_only_new_tokens_go_through_the_model():
    decoder = ScriptedDecoder.saying(3, [7, 8, 9])
    engine = Engine(decoder, 20)
    list(engine.generate([1, 2, 3], GenerateOptions(3)))
    assert decoder.passes == [[1, 2, 3], [7], [8]] and engine.held == [1, 2, 3, 7, 8]
    prefilled = next(engine.generate([1, 2, 3, 7, 8, 9, 5, 6], GenerateOptions(1)))
    assert decoder.passes[3:] == [[9, 5, 6]] and (prefilled.tokens, prefilled.reused) == (3, 5)
    prefilled = next(engine.generate([1, 2, 4, 7], GenerateOptions(1)))
    assert decoder.passes[4:] == [[4, 7]] and decoder.held[0] == [1, 2, 4, 7]
    prefilled = next(engine.generate([1, 2], GenerateOptions(1)))
    assert decoder.passes[5:] == [[2]] and prefilled.reused == 1  # its logits are needed again


def test_what_is_reused_does_not_change_the_answer(model):
    engine = Engine(model, 64)
    said = tokens(engine.generate(PROMPT, RANDOM))
    longer = [*PROMPT, *said, 8, 8]
    assert tokens(engine.generate(longer, RANDOM)) == answer(model, longer)
    assert tokens(engine.generate(PROMPT[:5], RANDOM)) == answer(model, PROMPT[:5])
    engine.reset()
    assert engine.held == [] and tokens(engine.generate(PROMPT, RANDOM)) == said


def test_a_step_ahead_changes_nothing_but_what_is_held():
    waiting, ahead = decoder(), decoder(asynchronous=True)
    said = answer(waiting, PROMPT)
    assert answer(ahead, PROMPT) == said
    engine = Engine(ahead, 64)
    *_, last = engine.generate(PROMPT, replace(RANDOM, stop_ids=frozenset({said[4]})))
    assert last.reason == "stop"
    assert engine.held == PROMPT + said[: last.tokens] and engine.cache.lengths[0] == len(engine.held)
    penalised = replace(RANDOM, sampling=SamplingParams(temperature=1.5, frequency=0.5))
    assert answer(ahead, PROMPT, penalised) == answer(waiting, PROMPT, penalised)


# ---- what stops it


@pytest.mark.parametrize("asynchronous", [False, True])
def test_closed_at_any_token_the_cache_stays_true(asynchronous):
    model, other = decoder(asynchronous), [*PROMPT, 30, 31]
    wanted = answer(model, other)
    for place in range(14):
        engine = closed_behind(model, place)
        assert tokens(engine.generate(other, RANDOM)) == wanted


# ---- several tokens at a time


@pytest.fixture
def bursting(monkeypatch):
    """A model on the processor's kernels, whose bursts are as long as they may be; what they drew is counted."""
    pytest.importorskip("ondevice.backends.cpu._native", reason="the kernels are not compiled")
    from ondevice.backends.cpu.recording import Replayed

    found, burst = [], Replayed.burst

    def counted(self, *arguments):
        drawn = burst(self, *arguments)
        found.append(0 if drawn is None else len(drawn))
        return drawn

    monkeypatch.setattr(Replayed, "burst", counted)
    monkeypatch.setattr(module, "LUMP", 60.0)
    ops = create_backend("cpu", threads=2)
    made = Decoder(CONFIG, ops, random_weights(CONFIG, ops, 32))
    made.bursts = found
    return made


def alone(model, prompt, options, monkeypatch):
    """The answer token by token."""
    with monkeypatch.context() as patched:
        patched.setattr(model.ops, "features", model.ops.features - {"burst"})
        return answer(model, prompt, options)


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0.0), RANDOM.sampling, SamplingParams(1.2, 7, 0.8)])
def test_bursts_say_what_single_steps_say(bursting, sampling, monkeypatch):
    for count in (1, 2, 3, 12, 40):
        options = GenerateOptions(count, sampling, seed=5)
        engine, single = Engine(bursting, 64), alone(bursting, PROMPT, options, monkeypatch)
        bursting.bursts.clear()
        *events, last = engine.generate(PROMPT, options)
        assert tokens(events) == single and (last.reason, last.tokens) == ("length", count)
        assert sum(bursting.bursts) == count - 1 and max(bursting.bursts, default=1) == min(8, max(1, count - 2))
        assert engine.held == PROMPT + single[:-1] and engine.cache.lengths[0] == len(engine.held)


def test_a_burst_ends_with_a_stop_id(bursting, monkeypatch):
    said = alone(bursting, PROMPT, RANDOM, monkeypatch)
    stop = said[6]
    *events, last = Engine(bursting, 64).generate(PROMPT, replace(RANDOM, stop_ids=frozenset({stop})))
    assert tokens(events) == said[: said.index(stop) + 1] and last.reason == "stop"


def test_who_stops_listening_in_a_burst_leaves_a_true_cache(bursting, monkeypatch):
    other = [*PROMPT, 30, 31]
    wanted = alone(bursting, other, RANDOM, monkeypatch)
    for place in range(14):
        engine = closed_behind(bursting, place)
        assert engine.cache.lengths[0] == len(engine.held)
        assert tokens(engine.generate(other, RANDOM)) == wanted


def test_what_needs_more_than_logits_goes_step_by_step(bursting, monkeypatch):
    for sampling in (SamplingParams(1.0, frequency=0.5), SamplingParams(0.0, top_logprobs=2)):
        answer(bursting, PROMPT, replace(RANDOM, sampling=sampling))
    answer(bursting, PROMPT, replace(RANDOM, logit_bias=((3, 1.0),)))
    assert not bursting.bursts


def test_an_interrupted_burst_leaves_a_true_cache(bursting, monkeypatch):
    from ondevice.backends.cpu.recording import Replayed

    other, burst = [*PROMPT, 30, 31], Replayed.burst
    wanted = alone(bursting, other, RANDOM, monkeypatch)

    def interrupted(self, *arguments):
        burst(self, *arguments)
        if len(bursting.bursts) == 2:
            raise KeyboardInterrupt

    engine = Engine(bursting, 64)
    with monkeypatch.context() as patched:
        patched.setattr(Replayed, "burst", interrupted)
        bursting.bursts.append(0)
        with pytest.raises(KeyboardInterrupt):
            list(engine.generate(PROMPT, RANDOM))
    assert tokens(engine.generate(other, RANDOM)) == wanted


class Ring(HostCache):
    """Goes back two tokens at most; a longer way is a new beginning."""

    def truncate(self, slot, length):
        far = self.lengths[slot] - length > 2
        if far:
            for part in (*self.keys, *self.values):
                part[slot] = np.nan
        return super().truncate(slot, 0 if far else length)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("cache", [HostCache, Ring])
def test_interrupted_at_any_operation_the_cache_stays_true(asynchronous, cache, monkeypatch):
    model, other, short = decoder(asynchronous), [*PROMPT, 30, 31], replace(RANDOM, max_tokens=3)
    monkeypatch.setattr("ondevice.backends.reference.HostCache", cache)
    monkeypatch.setattr(module, "PREFILL_CHUNK", 3)
    wanted = answer(model, other, short)
    engine = Engine(model, 64)
    assert type(engine.cache) is cache
    model.ops.calls = 0
    list(engine.generate(PROMPT, short))
    for until in range(1, model.ops.calls + 1):
        engine = Engine(model, 64)
        model.ops.calls, model.ops.until = 0, until
        with pytest.raises(KeyboardInterrupt):
            list(engine.generate(PROMPT, short))
        model.ops.until = -1
        assert tokens(engine.generate(other, short)) == wanted, f"interrupted at operation {until}"


def test_new_adapters_drop_what_was_computed_with_the_old(model):
    engine = Engine(model, 64)
    said = tokens(engine.generate(PROMPT, RANDOM))
    engine.recompile()
    assert engine.held == [] and tokens(engine.generate(PROMPT, RANDOM)) == said
