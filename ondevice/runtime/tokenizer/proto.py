"""sentencepiece's model files (protocol buffers), as far as a tokenizer needs them: read without trust, and written.

Field numbers: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .vocabulary import Kind

UNIGRAM, BPE = 1, 2
VARINT, FIXED64, CHUNK, FIXED32 = 0, 1, 2, 5  # wire types


@dataclass
class Model:
    """pieces: (text, score, Kind) by id. The ids are -1 where the model has no such token."""

    pieces: Sequence[tuple[str, float, int]]
    type: int = BPE
    byte_fallback: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    dummy_prefix: bool = True  # a space in front of a text
    charsmap: bytes = field(default=b"", repr=False)  # a compiled normalization of characters


def write(model: Model) -> bytes:
    """A model file that normalizes nothing but spaces."""
    pieces = b"".join(_chunk(1, _piece(*piece)) for piece in model.pieces)
    trainer = _number(3, model.type) + _number(35, model.byte_fallback)
    ids = {40: model.unk_id, 41: model.bos_id, 42: model.eos_id, 43: model.pad_id}
    trainer += b"".join(_number(name, id) for name, id in ids.items())
    spelled = {45: model.unk_id, 46: model.bos_id, 47: model.eos_id, 48: model.pad_id}
    for name, id in spelled.items():
        trainer += _chunk(name, model.pieces[id][0].encode()) if id >= 0 else b""
    normalizer = _chunk(1, b"identity") + _number(3, model.dummy_prefix) + _number(4, 0) + _number(5, 1)
    return pieces + _chunk(2, trainer) + _chunk(3, normalizer)


def without_dummy_prefix(raw: bytes) -> bytes:
    """The same model, except that it puts no space in front of a text: a field given twice counts as given last."""
    return raw + _chunk(3, _number(3, 0))


def cut(raw: bytes, kept: Sequence[int]) -> bytes:
    """The same model with these of its pieces alone, ascending ids; those that it names go by the new numbering."""
    model, new, made, at = read(raw), {old: id for id, old in enumerate(kept)}, [], 0
    named = {4: len(kept), 40: new.get(model.unk_id, -1), 41: new.get(model.bos_id, -1)}
    named |= {42: new.get(model.eos_id, -1), 43: new.get(model.pad_id, -1)}
    for name, value in _fields(raw):
        if name == 1:
            made += [_chunk(name, value)] if at in new else []
            at += 1
        elif name == 2:  # a field given twice counts as given last
            made.append(_chunk(name, value + b"".join(_number(*field) for field in named.items())))
        elif isinstance(value, bytes):
            made.append(_chunk(name, value))
    return b"".join(made)


def read(raw: bytes) -> Model:
    """Raises ValueError for bytes that are no such file."""
    pieces: list[tuple[str, float, int]] = []
    model = Model(pieces, type=UNIGRAM)
    for name, value in _fields(raw):
        if name in (1, 2, 3) and not isinstance(value, bytes):
            raise ValueError("a message is a number")
        if name == 1:
            pieces.append(_read_piece(value))
        elif name == 2:
            _read_trainer(value, model)
        elif name == 3:
            _read_normalizer(value, model)
    if not pieces:
        raise ValueError("it has no pieces")
    return model


# ---------------------------------------------------------------------------------------------------- messages


def _piece(text: str, score: float, kind: int) -> bytes:
    return _chunk(1, text.encode()) + struct.pack("<Bf", 2 << 3 | FIXED32, score) + _number(3, kind)


def _read_piece(raw: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, int(Kind.NORMAL)
    for name, value in _fields(raw):
        if name == 1 and isinstance(value, bytes):
            text = value.decode()
        elif name == 2 and isinstance(value, float):
            score = value
        elif name == 3 and isinstance(value, int):
            kind = value
    return text, score, kind


TRAINER = {3: "type", 35: "byte_fallback", 40: "unk_id", 41: "bos_id", 42: "eos_id", 43: "pad_id"}


def _read_trainer(raw: bytes, model: Model) -> None:
    for name, value in _fields(raw):
        if name in TRAINER and isinstance(value, int):
            setattr(model, TRAINER[name], value)


def _read_normalizer(raw: bytes, model: Model) -> None:
    for name, value in _fields(raw):
        if name == 2 and isinstance(value, bytes):
            model.charsmap = value
        elif name == 3:
            model.dummy_prefix = bool(value)


# ------------------------------------------------------------------------------------------------- wire format


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers are written in two's complement
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(name: int, value: int) -> bytes:
    return _varint(name << 3 | VARINT) + _varint(value)


def _chunk(name: int, value: bytes) -> bytes:
    return _varint(name << 3 | CHUNK) + _varint(len(value)) + value


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    """The number and where it ends."""
    value = shift = 0
    while shift < 64:
        if at >= len(raw):
            raise ValueError("it ends within a number")
        byte = raw[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("a number is too long")


def _fields(raw: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Field number and value, in the order of the file."""
    at = 0
    while at < len(raw):
        key, at = _read_varint(raw, at)
        wire = key & 7
        if wire == VARINT:
            value, at = _read_varint(raw, at)
            yield key >> 3, value - (1 << 64) if value >> 63 else value
            continue
        if wire == CHUNK:
            size, at = _read_varint(raw, at)
        elif wire in (FIXED32, FIXED64):
            size = 4 if wire == FIXED32 else 8
        else:
            raise ValueError(f"it has a field of the unknown type {wire}")
        if size > len(raw) - at:
            raise ValueError("it ends within a field")
        part = raw[at : at + size]
        at += size
        yield key >> 3, struct.unpack("<f", part)[0] if wire == FIXED32 else part
