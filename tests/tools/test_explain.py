"""What explain shows against transformers' own attention and hidden states, brute force, and the shape of its page."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ondevice.backends.base import AttentionSpec
from ondevice.errors import BadFile, BadOption, ContextFull
from ondevice.registry import create_backend
from ondevice.runtime.session import open_session
from ondevice.testing.family import open_decoder
from ondevice.tools.explain import explain, page, positions_of
from ondevice.tools.explain.glossary import DOCS, LANGUAGES, TERMS, WORDS, anchor
from ondevice.tools.explain.numbers import decimal, percent
from ondevice.tools.explain.seeing import attention_weights, see
from tests.models import twins
from tests.tiny_model import write_tiny_model

ROOT = Path(__file__).parents[2]
SENTENCE = "the hand and the sand in the tin: then and on"


@pytest.mark.parametrize("name", twins.TWINS)
def test_attention_is_that_of_transformers(name, tmp_path):
    import torch

    twin = twins.make(name)
    twin.save_pretrained(tmp_path)
    twin.set_attn_implementation("eager")
    decoder = open_decoder(tmp_path, create_backend("cpu", exact=True), length=13)
    ids = np.random.default_rng(3).integers(0, decoder.config.vocab, 13).tolist()
    seen = see(decoder, ids)
    with torch.no_grad():
        wanted = twin(torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
    wanted = [weights[0].float().numpy() for weights in wanted if weights is not None]
    assert len(wanted) == len(seen.attention) and decoder.listener is None
    for got, want in zip(seen.attention.values(), wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


ONE_EACH = [pytest.param(name, marks=[pytest.mark.slow] if "-" in name else []) for name in twins.TWINS]
NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "embedding_norm")  # the last one, as families call it


class Reply(tuple):
    """What an inner model returns, with nothing but the last state."""

    past_key_values = hidden_states = attentions = cross_attentions = router_logits = None

    def __new__(cls, state):
        return super().__new__(cls, (state,))

    @property
    def last_hidden_state(self):
        return self[0]


def said_after(twin, state):
    """[T, V]: the logits of transformers' own head, were `state` [1, T, D] what its last block gave."""
    inner = getattr(twin, "model", twin.base_model)
    norm = next(getattr(inner, name) for name in NORMS if hasattr(inner, name))
    reply = Reply(norm(state))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inner, "forward", lambda *args, **kwargs: reply)
        return twin(inputs_embeds=state).logits[0]


@pytest.mark.parametrize("name", ONE_EACH)
def test_the_lens_is_that_of_transformers(name, tmp_path):
    import torch

    folder = write_tiny_model(tmp_path / name)
    twin = twins.make(name, vocab_size=106, max_position_embeddings=64)
    twin.save_pretrained(folder)
    with open_session(folder, backend="cpu", exact=True, context=24) as session:
        ids = session.encode_prompt(SENTENCE)
        *events, found = explain(session, ids)
    with torch.no_grad():
        output = twin(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
        logits = [said_after(twin, state) for state in output.hidden_states[:-1]] + [output.logits[0]]
        chances = [stage.softmax(-1).double().numpy() for stage in logits]
    assert len(found.lens.guesses) == len(chances) == events[-1].total
    finals = chances[-1].argmax(-1)
    for stage, wanted in enumerate(chances):
        np.testing.assert_allclose(found.lens.chance[stage], wanted[np.arange(len(ids)), finals], atol=1e-5)
        for place, (first, second, third) in enumerate(found.lens.guesses[stage]):
            best = np.argsort(-wanted[place])[:3]
            np.testing.assert_allclose(
                [first.probability, second.probability, third.probability], wanted[place][best], atol=1e-5
            )
            assert first.id == best[0]
    assert (found.lens.rank[-1] == 0).all()
    assert [guess.id for guess in found.next] == np.argsort(-chances[-1][-1])[:10].tolist()


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    with open_session(write_tiny_model(tmp_path_factory.mktemp("explain") / "tiny"), backend="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def found(session):
    ids = session.encode_prompt(SENTENCE)
    *_, explanation = explain(session, ids, positions_of(session.tokenizer, ids, "the"))
    return explanation


def test_the_pieces_belong_together(found, session):
    ids = session.encode_prompt(SENTENCE)
    assert [token.id for token in found.tokens] == ids and len(found.focus) == 3
    assert found.next[0].probability == pytest.approx(found.lens.chance[-1, -1])
    for at in found.focus:
        looks = found.looks(at)
        assert looks.sum() == pytest.approx(1, abs=1e-5) and (looks[at + 1 :] == 0).all()
        for layer, head, token, share in found.heads(at):
            assert 0 < token < at and share == found.attention[layer][head, at, token]
            assert share == found.attention[layer][head, at, 1:at].max()
    np.testing.assert_allclose(found.likeness[:, 0], 1, atol=1e-6)
    same = [at for at in found.focus if ids[at] == ids[found.focus[0]]]
    assert found.likeness[0, found.focus.index(same[-1])] == pytest.approx(1, abs=1e-6)


def test_neighbours_are_the_nearest(found, session):
    from ondevice.schemes import to_float

    table = to_float(session.parameters["embed"]).astype(np.float64)
    ways = table / np.linalg.norm(table, axis=-1, keepdims=True)
    for id, near in found.neighbours.items():
        cosines = ways @ ways[id]
        cosines[id] = -2
        assert [n.id for n in near] == np.argsort(-cosines)[:5].tolist()
        np.testing.assert_allclose([n.cosine for n in near], np.sort(cosines)[::-1][:5], atol=1e-6)


def test_sinks_and_chunks():
    draw = np.random.default_rng(0)
    q, k = draw.normal(size=(7, 4, 8)).astype(np.float32), draw.normal(size=(7, 2, 8)).astype(np.float32)
    sinks = np.array([1.0, -2.0, 0.5, 9.0], np.float32)
    got = attention_weights(q, k, AttentionSpec(0.3, chunk=3), sinks)
    for head in range(4):
        for i in range(7):
            seen = [j for j in range(i + 1) if j // 3 == i // 3]
            powers = np.exp([0.3 * float(q[i, head] @ k[j, head // 2]) for j in seen])
            wanted = np.zeros(7)
            wanted[seen] = powers / (powers.sum() + np.exp(sinks[head]))
            np.testing.assert_allclose(got[head, i], wanted, atol=1e-6)


def test_words_are_found_where_they_end(session):
    def texts(text, word):
        ids = session.tokenizer.encode(text)
        return [session.tokenizer.decode(ids[: at + 1]) for at in positions_of(session.tokenizer, ids, word)]

    assert texts("the hand, then THE end", "the") == ["the", "the hand, then THE"]
    assert texts("a hand on hand", "hand") == ["a hand", "a hand on hand"]
    assert texts("a tin's (tin)", "tin") == ["a tin", "a tin's (tin"]
    for word in ("han", "", "nothing"):
        with pytest.raises(BadOption, match="no word"):
            texts("a hand", word)


def test_what_cannot_be_explained(session):
    with pytest.raises(BadOption, match="no tokens"):
        list(explain(session, []))
    with pytest.raises(ContextFull, match="600 tokens and 256"):
        list(explain(session, [5] * 600))
    with pytest.raises(BadOption, match="outside"):
        list(explain(session, [5, 106]))


def test_a_broken_model_is_not_explained(session, monkeypatch):
    head = session.decoder.head
    monkeypatch.setattr(session.decoder, "head", lambda *given: head(*given) * np.float32("nan"))
    with pytest.raises(BadFile, match="predictions are NaN"):
        list(explain(session, [5, 6, 7]))


def test_a_long_text_has_the_lens_at_its_end(session):
    *_, explanation = explain(session, [5 + i % 90 for i in range(100)])
    assert explanation.lens.first == 36 and explanation.lens.chance.shape == (3, 64)
    assert "</html>" in page.html(explanation, "tiny", "en")


# ---------------------------------------------------------------------------------------------- the words


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_term_stands_in_the_glossary(language):
    text = (ROOT / DOCS[language]).read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (.+)\n\n((?:.+\n)+)", text, re.M))
    for term in TERMS.values():
        assert " ".join(sections[term[language].word].split()) == term[language].meaning
    assert list(sections) == sorted(sections, key=str.lower)


def test_both_languages_say_the_same_things():
    assert WORDS["en"].keys() == WORDS["pt"].keys()
    for name in WORDS["en"]:
        fields = [set(re.findall(r"{\w+}", WORDS[language][name])) for language in LANGUAGES]
        assert fields[0] == fields[1], name


# ---------------------------------------------------------------------------------------------- the page


class Page(HTMLParser):
    """Elements with their attributes; complains of ones that are not closed in order."""

    VOID = ("meta", "line")

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.open, self.data, self.shown = [], [], {}, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("script", "title"):
            self.data.setdefault(self.open[-1], []).append(text)
        elif "style" not in self.open:
            self.shown.append(text)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_page_stands_alone(found, language):
    text = page.html(found, "/home/somebody/<tiny>.gguf", language)
    parsed = Page(text)
    assert not parsed.open and parsed.data["title"][0].startswith("<tiny>.gguf: ")
    attributes = [(tag, name, value) for tag, pairs in parsed.elements for name, value in pairs.items()]
    assert not [a for a in attributes if a[1] in ("src", "action", "background")], "something would be fetched"
    assert not [tag for tag, _ in parsed.elements if tag in ("link", "img", "iframe")]
    assert "url(" not in text and "@import" not in text and "http:" not in text and "https:" not in text
    assert "default-src 'none'" in text and ("html", "lang", language) in attributes
    ids = [value for _, name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids)) and {"tokens", "next", "lens", "near", "likeness", "glossary"} <= set(ids)
    links = [value for tag, name, value in attributes if (tag, name) == ("a", "href")]
    assert len(links) > 8 and all(link[1:] in ids for link in links)
    assert {f"g-{anchor(term[language].word)}" for term in TERMS.values()} <= set(ids)
    assert sum(tag == "button" for tag, _ in parsed.elements) == len(found.tokens)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    script = parsed.data["script"][1]
    for wanted in re.findall(r'\$\("(\w+)"\)', script):
        assert wanted in ids, wanted


def test_numbers_are_written_as_the_language_writes_them(found):
    """A share, a cosine, an axis; the script is told the mark."""
    english, portuguese = (Page(page.html(found, "tiny", language)) for language in LANGUAGES)
    assert [json.loads(p.data["script"][0])["mark"] for p in (english, portuguese)] == [".", ","]
    for parsed, own, other in ((english, r"\d\.\d", r"\d,\d"), (portuguese, r"\d,\d", r"\d\.\d")):
        shown = "\n".join([*parsed.shown, *(pairs.get("title") or "" for _, pairs in parsed.elements)])
        assert len(re.findall(own, shown)) > 20 and not re.findall(other, shown), re.findall(other, shown)
    assert (decimal(-0.125, "pt", 3), percent(0.6718, "pt"), percent(0.6718, "en", 0)) == ("-0,125", "67,2%", "67%")


def test_the_page_holds_the_attention(found):
    packed = json.loads(Page(page.html(found, "tiny", "en")).data["script"][0])["attention"]
    shares, at = base64.b64decode(packed["shares"]), 0
    assert packed["layers"] == [0, 1] and packed["heads"] == [4, 4]
    for layer in packed["layers"]:
        for head in found.attention[layer]:
            for i, row in enumerate(head):
                np.testing.assert_allclose(
                    np.frombuffer(shares[at : at + i + 1], np.uint8) / 255, row[: i + 1], atol=2e-3
                )
                at += i + 1
    assert at == len(shares)


def test_a_page_of_a_long_text_averages_the_heads(found, monkeypatch):
    monkeypatch.setattr(page, "MOST_SHARES", 10)
    packed = json.loads(Page(page.html(found, "tiny", "en")).data["script"][0])["attention"]
    assert packed["heads"] == [1, 1]


def test_what_a_text_says_cannot_become_part_of_the_page(found):
    evil = "</script><img>&amp;"
    tokens = tuple(replace(token, text=evil) for token in found.tokens)
    guesses = tuple(replace(guess, text=evil) for guess in found.next)
    lens = replace(found.lens, guesses=tuple((guesses[:3],) * len(tokens) for _ in found.lens.guesses))
    parsed = Page(page.html(replace(found, tokens=tokens, next=guesses, lens=lens), evil, "en"))
    assert sum(tag == "script" for tag, _ in parsed.elements) == 2
    assert not [tag for tag, _ in parsed.elements if tag == "img"]
    assert {token["text"] for token in json.loads(parsed.data["script"][0])["tokens"]} == {evil}


# ---------------------------------------------------------------------------------------------- the command


def ondevice(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "ondevice", *map(str, arguments)], capture_output=True, text=True)


def test_the_command(tmp_path):
    folder = write_tiny_model(tmp_path / "tiny")
    shown = ondevice("explain", folder, SENTENCE, "--word", "the", "--language", "pt")
    assert shown.returncode == 0, shown.stderr
    for word in ("Quem olha para quem", "camada 1", "Lente de logits:", "docs/glossario.md", "the 97"):
        assert word in shown.stdout, word
    told = ondevice("explain", folder, SENTENCE, "--json", "--html", tmp_path / "page.html", "--top", "4")
    facts = json.loads(told.stdout)
    assert len(facts["next"]) == 4 and facts["text"] == SENTENCE and len(facts["focus"]) == 1
    assert sum(facts["focus"][0]["looks"]) == pytest.approx(1, abs=1e-5)
    assert Page((tmp_path / "page.html").read_text(encoding="utf-8")).elements
    chat = json.loads(ondevice("explain", folder, "the hand", "--chat", "--json").stdout)
    assert chat["tokens"][0] == {"id": 104, "text": "<|im_start|>", "special": True}


def test_what_the_command_refuses(tmp_path):
    folder = write_tiny_model(tmp_path / "tiny")
    for wrong in (["--word", "cat"], ["--html", tmp_path / "no" / "page.html"], ["--language", "fr"]):
        done = ondevice("explain", folder, SENTENCE, *wrong)
        assert done.returncode == 2 and "Traceback" not in done.stderr and not done.stdout
    assert ondevice("explain", folder, "").returncode == 2


def test_bow_is_read_by_what_is_done_with_it(smollm2_gguf):
    """The archer's is drawn, the ribbon's is tied: the same token, another look back."""
    with open_session(smollm2_gguf, backend="cpu") as opened:
        ids = opened.encode_prompt("The archer drew his bow and shot. She tied a bow in her hair")
        places = positions_of(opened.tokenizer, ids, "bow")
        *_, explanation = explain(opened, ids, places)
    assert ids[places[0]] == ids[places[1]]
    for place, verb in zip(places, (" drew", " tied"), strict=True):
        looks = explanation.looks(place)
        earlier = max(range(1, place), key=lambda at: looks[at])
        assert explanation.tokens[earlier].text == verb
    assert explanation.likeness[0, 1] == pytest.approx(1, abs=1e-5) and explanation.likeness[-1, 1] < 0.9
