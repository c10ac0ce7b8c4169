"""Our GGUF reader against the gguf package, and against files that lie."""

from __future__ import annotations

import struct
import time

import gguf
import numpy as np
import pytest

from ondevice.checkpoint import open_checkpoint, release
from ondevice.checkpoint.files import Mapped
from ondevice.checkpoint.gguf import _guessed_edges, _Reader
from ondevice.errors import BadFile, Unavailable, Unsupported
from ondevice.tensors import Blocks, Dense
from tests.files.small_models import write_gguf


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def u64(n: int) -> bytes:
    return struct.pack("<Q", n)


def text(s: str | bytes) -> bytes:
    raw = s.encode() if isinstance(s, str) else s
    return u64(len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + u32(kind) + value


def info(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def file(pairs: list[bytes], infos: list[bytes], data: bytes = bytes(128), version: int = 3) -> bytes:
    """A GGUF by hand, so that it can lie."""
    head = b"GGUF" + u32(version) + u64(len(infos)) + u64(len(pairs)) + b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % 32) + data


def test_tensors_are_what_was_written(gguf_file):
    path, held = gguf_file
    with open_checkpoint(path) as model:
        assert model.kind == "gguf" and model.config == {} and model.files == {}
        assert set(model.names) == set(held) and model.nbytes == sum(part.nbytes for part in held.values())
        for name, values in held.items():
            assert np.array_equal(model[name].parts["weight"], values), name
        assert model["q4_k"].format == Blocks("Q4_K") and model["q4_k"].shape == (3, 512)
        assert model["half"].format == Dense("float16") and model["half"].shape == (2, 3, 4)


def test_metadata_is_what_the_package_reads(gguf_file):
    path, _ = gguf_file
    metadata = open_checkpoint(path).metadata
    fields = {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items() if not k.startswith("GGUF.")}
    assert dict(metadata) == fields
    assert metadata["words"] == "grüß dich 🙂" and metadata.get("absent") is None


def test_a_large_vocabulary_opens_fast(tmp_path):
    path = tmp_path / "many.gguf"
    write_gguf(path, kinds=(), tokens=100_000)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        model = open_checkpoint(path)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.03  # 100,000 strings; a vocabulary and its merges
    assert model.metadata["tokenizer.ggml.tokens"][99_999] == "token99999é"


STRINGS = {
    "short": ["a", "ä", "🙂", " ", "b" * 255],
    "long": ["a" * 255, "b" * 256, "c" * 257, "d" * 511, "e" * 512, "é" * 33, *"some short ones".split()] * 40,
    "one": ["x"],
    "longest": ["a", "b" * 70_000, "c"],
    "empty": ["", "a", "", "b", ""],
    "none": [],
    "zeros": ["a\0b", "\0", "c\0\0\0\0\0\0\0", "\0\0\0\0\0\0\0\0\0\1d"],
}


@pytest.mark.parametrize("strings", STRINGS.values(), ids=STRINGS)
def test_strings_of_any_length_and_content(tmp_path, strings):
    """Whatever the quick way over a list makes of its zeros; what stands behind the list is found."""
    array = u32(8) + u64(len(strings)) + b"".join(map(text, strings))
    (tmp_path / "x.gguf").write_bytes(file([pair("a", 9, array), pair("b", 4, u32(7))], []))
    metadata = open_checkpoint(tmp_path / "x.gguf").metadata
    assert metadata["a"] == strings and metadata["b"] == 7


def test_the_quick_way_over_a_list_takes_what_vocabularies_hold(tmp_path):
    """Rows of blanks may be longer than 255 bytes; a string with zeros goes the slow way."""
    words = [*map(str, range(1000)), "Ġ" * 128, "Ġ" * 200, "end"]
    (tmp_path / "x.gguf").write_bytes(b"".join(map(text, words)) + bytes(range(64)))
    reader = _Reader(Mapped(tmp_path / "x.gguf"))
    edges = _guessed_edges(reader, len(words))
    assert np.array_equal(np.diff(edges), [8 + len(word.encode()) for word in words])
    (tmp_path / "x.gguf").write_bytes(b"".join(map(text, ["a\0\0\0\0\0\0\0", *words])))
    assert _guessed_edges(_Reader(Mapped(tmp_path / "x.gguf")), len(words)) is None


def test_tensors_are_views_until_touched(gguf_file):
    path, held = gguf_file
    tensor = open_checkpoint(path)["q8_0"]
    assert not tensor.parts["weight"].flags.owndata and not tensor.parts["weight"].flags.writeable
    release(tensor)
    assert np.array_equal(tensor.parts["weight"], held["q8_0"])


def test_a_folder_with_one_gguf(gguf_file):
    path, held = gguf_file
    assert set(open_checkpoint(path.parent).names) == set(held)
    (path.parent / "second.gguf").write_bytes(path.read_bytes())
    with pytest.raises(BadFile, match=r"2 \.gguf files"):
        open_checkpoint(path.parent)


def test_version_2_is_read(tmp_path):
    (tmp_path / "v2.gguf").write_bytes(file([], [info("x", [4])], version=2))
    assert open_checkpoint(tmp_path / "v2.gguf")["x"].shape == (4,)


def test_odd_alignment_is_copied_into_place(tmp_path):
    pairs = [pair("general.alignment", 4, u32(1))]
    data = b"GGUF" + u32(3) + u64(1) + u64(1) + b"".join(pairs) + info("x", [4]) + np.arange(4, dtype="<f4").tobytes()
    (tmp_path / "odd.gguf").write_bytes(data)
    values = open_checkpoint(tmp_path / "odd.gguf")["x"].parts["weight"]
    assert values.flags.aligned and values.tolist() == [0, 1, 2, 3]


ok, x, eight = pair("a", 4, u32(1)), info("x", [4]), bytes(8)
DAMAGED = {
    "empty": (b"", "is empty"),
    "another format": (b"GGML" + bytes(64), "not a GGUF"),
    "only the magic": (b"GGUF", "ends within its version"),
    "more tensors than fit": (b"GGUF" + u32(3) + u64(1 << 60) + u64(0) + bytes(64), "tensors, more than fit"),
    "more keys than fit": (b"GGUF" + u32(3) + u64(0) + u64(1 << 63) + bytes(64), "metadata keys, more than fit"),
    "key longer than the file": (file([u64(1 << 62) + bytes(32)], []), "more than fit"),
    "key not text": (file([text(b"\xff\xfe") + u32(4) + u32(1)], []), "not UTF-8"),
    "key twice": (file([ok, ok], []), "key 'a' twice"),
    "unknown value type": (file([pair("a", 99, b"")], []), "unknown type 99"),
    "array longer than the file": (file([pair("a", 9, u32(4) + u64(1 << 61))], []), "more than fit"),
    "array of arrays": (file([pair("a", 9, u32(9) + u64(1) + u32(4) + u64(0))], []), "unknown type 9"),
    "string array too long": (file([pair("a", 9, u32(8) + u64(1 << 50))], []), "more than fit"),
    "string of an array too long": (file([pair("a", 9, u32(8) + u64(2) + u64(1 << 63) + eight)], []), "ends within"),
    "alignment not a power": (file([pair("general.alignment", 4, u32(24))], [x]), "alignment is 24"),
    "alignment zero": (file([pair("general.alignment", 4, u32(0))], [x]), "alignment is 0"),
    "alignment text": (file([pair("general.alignment", 8, text("32"))], [x]), "alignment is '32'"),
    "rank 0": (file([], [info("x", [])]), "0 dimensions"),
    "rank 5": (file([], [info("x", [1] * 5)]), "5 dimensions"),
    "dimension 0": (file([], [info("x", [4, 0])]), r"shape \[0, 4\]"),
    "dimensions whose product overflows": (file([], [info("x", [1 << 33, 1 << 33])]), "beyond the end"),
    "unknown tensor type": (file([], [info("x", [4], kind=77)]), "unknown type 77"),
    "rows not whole blocks": (file([], [info("x", [33, 1], kind=2)]), "whole blocks of Q4_0"),
    "tensor twice": (file([], [x, x]), "tensor 'x' twice"),
    "offset not aligned": (file([], [info("x", [4], offset=4)]), "multiple of 32"),
    "offset beyond the end": (file([], [info("x", [4], offset=1 << 40)]), "beyond the end"),
    "overlap": (file([], [info("x", [16]), info("y", [4], offset=32)]), "'x' and 'y' overlap"),
    "one part of many": (file([pair("split.count", 2, struct.pack("<H", 3))], []), "one of 3 parts"),
}


@pytest.mark.parametrize(("content", "says"), DAMAGED.values(), ids=DAMAGED)
def test_damage_is_named(tmp_path, content, says):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(BadFile, match=says) as caught:
        open_checkpoint(path)
    assert "bad.gguf" in caught.value.message and caught.value.hint


UNSUPPORTED = {
    "version 1": (file([], [], version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(32), "big-endian"),
    "IQ types": (file([], [info("x", [256], kind=23)]), "IQ4_XS"),
}


@pytest.mark.parametrize(("content", "says"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_is_not_read_is_named(tmp_path, content, says):
    (tmp_path / "new.gguf").write_bytes(content)
    with pytest.raises(Unsupported, match=says) as caught:
        open_checkpoint(tmp_path / "new.gguf")
    assert caught.value.hint


def test_text_that_is_not_utf8_is_found_when_read(tmp_path):
    (tmp_path / "x.gguf").write_bytes(file([pair("a", 9, u32(8) + u64(1) + text(b"\xff"))], []))
    metadata = open_checkpoint(tmp_path / "x.gguf").metadata
    with pytest.raises(BadFile, match="a string of 'a' is not UTF-8"):
        metadata["a"]


def test_truncation_at_every_byte_of_the_header(gguf_file):
    path, _ = gguf_file
    whole = path.read_bytes()
    cut = path.with_name("cut.gguf")
    for size in range(0, len(whole) - 32, 7):  # the last tensor is padded by less
        cut.write_bytes(whole[:size])
        with pytest.raises(BadFile):
            open_checkpoint(cut)


def test_a_missing_file_and_tensor_are_named(gguf_file, tmp_path):
    with pytest.raises(Unavailable, match=r"nothing\.gguf"):
        open_checkpoint(tmp_path / "nothing.gguf")
    with pytest.raises(BadFile, match="no tensor named 'zzz'"):
        open_checkpoint(gguf_file[0])["zzz"]
