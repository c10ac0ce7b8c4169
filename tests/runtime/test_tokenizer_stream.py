"""Tokens into text: whole characters only, and the same text piece by piece as at once."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from ondevice.errors import BadOption
from ondevice.runtime.tokenizer.bpe import BpeEngine


def streamed(tokenizer, ids, **options) -> list[str]:
    stream = tokenizer.stream(**options)
    return [*map(stream.push, ids), stream.flush()]


def test_decode_gives_the_text_back(smollm2, oracle):
    for text, ids in zip(oracle["texts"], oracle["smollm2_plain"], strict=True):
        lacking = set(text) & {chr(c) for c in range(0x20)}  # SmolLM2 can't spell some control characters
        if not lacking:
            assert smollm2.decode(ids) == text


def test_pieces_add_up_and_are_whole(smollm2, oracle):
    for text, ids in zip(oracle["texts"], oracle["smollm2"], strict=True):
        pieces = streamed(smollm2, ids)
        assert "".join(pieces) == smollm2.decode(ids)
        assert "\ufffd" not in "".join(pieces) or "\ufffd" in text


@pytest.mark.parametrize("seed", range(20))
def test_arbitrary_ids_too(smollm2, seed):
    rng = random.Random(seed)
    broken = [id for id in range(smollm2.vocab_size) if smollm2.bytes_of(id).decode("utf-8", "ignore") == ""]
    ids = [rng.choice(broken) if rng.random() < 0.6 else rng.randrange(-3, smollm2.vocab_size + 9) for _ in range(300)]
    for skip in (True, False):
        text = smollm2.decode(ids, skip_special=skip)
        assert "".join(streamed(smollm2, ids, skip_special=skip)) == text
        hidden = smollm2.special_ids if skip else ()
        assert b"".join(smollm2.bytes_of(id) for id in ids if id not in hidden).decode("utf-8", "replace") == text


def test_a_character_waits_for_its_last_byte(smollm2):
    ids = smollm2.encode("👍🏽")
    assert len(ids) > 2
    pieces = streamed(smollm2, ids)
    assert [piece for piece in pieces if piece] == ["👍", "🏽"]
    assert streamed(smollm2, ids[:-1])[-1] == "\ufffd"


def test_pieces_for_people(smollm2):
    shown = [smollm2.piece(id) for id in smollm2.encode("a b\n👍<|im_end|>")]
    assert shown == ["a", " b", "\\n", "\\xf0\\x9f", "\\x91", "\\x8d", "<|im_end|>"]
    assert smollm2.piece(10**9) == ""


def test_half_a_character_is_refused(smollm2):
    with pytest.raises(BadOption, match="character 2"):
        smollm2.encode("ab\udcff")


class Dawdling:
    """A library's tokenizer that reads its settings late: the ids say whether special tokens were parsed."""

    pre_tokenizer, encode_special_tokens = None, False

    def no_truncation(self):
        pass

    no_padding = no_truncation

    def get_added_tokens_decoder(self):
        return {}

    def encode(self, text, add_special_tokens):
        time.sleep(0.001)
        return SimpleNamespace(ids=[not self.encode_special_tokens])


def test_threads_do_not_disturb_each_other():
    engine, wanted = BpeEngine(Dawdling()), [bool(i % 2) for i in range(100)]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda parse: engine.encode("", parse_special=parse), wanted)
        assert list(found) == [[parse] for parse in wanted]
