"""SentencePiece models without the library: a small reader of `.model` / `.spm` files, and their segmentation.

Meant to equal `sentencepiece` in every id (`python -m tests.text.compare_sentencepiece` compares). A Unigram
segmentation is the best path by a sum of fp32 scores, and sentencepiece rounds that sum to fp32 at every step, so that
two segmentations closer than the rounding are told apart by where in the text they stand. Words are therefore segmented
once and kept with the size of the sum up to which rounding cannot matter; a text that exceeds it is done as a whole,
with the same rounding.
"""

import heapq
import re
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from s2s_ray.errors import PresetError, UnsupportedModelError
from s2s_ray.text.charsmap import SPACE, Normalizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_UNIGRAM, _BPE = 1, 2
_UNKNOWN_PENALTY = 10.0
_SMALLEST_FLOAT = 1.1754943508222875e-38  # FLT_MIN, where sentencepiece starts to look for the largest score
_ROUNDING = 2.0**-23  # of a sum, for the two segmentations together, per step
_MAX_PIECES = 2**21
_MAX_WORD = 48  # characters; longer stretches without a space are not kept
_KEPT_WORDS = 2**16
_WORDS = re.compile(f"{SPACE}[^{SPACE}]*|[^{SPACE}]+")

Fields = dict[int, list[int | bytes]]


@dataclass(frozen=True, slots=True)
class _Word:
    ids: list[int]
    score: float
    limit: float  # the size of a text's sum of scores below which rounding cannot change `ids`


class SentencePieceModel:
    """One model: `encode` gives SentencePiece's own ids, `decode` takes pieces.

    Raises PresetError for a file that is no such model, UnsupportedModelError for a kind that is not read here.
    """

    def __init__(self, data: bytes) -> None:
        model = _parse(data)
        trainer, normalizer = (_parse(_bytes(_last(model, number, b""))) for number in (2, 3))
        self.pieces, self.scores, self.types = _read_pieces(model.get(1, []))
        self.kind = _number(_last(trainer, 3, _UNIGRAM))
        byte_fallback = bool(_last(trainer, 35, 0))
        if (
            self.kind not in (_UNIGRAM, _BPE)
            or not _last(normalizer, 5, 1)
            or _parse(_bytes(_last(model, 5, b""))).get(2)
        ):
            raise UnsupportedModelError(
                "a SentencePiece model must be Unigram or BPE, with escaped spaces and no denormalisation map. "
                f"Received: model type {self.kind}"
            )
        self.unknown_id = self.types.index(UNKNOWN) if self.types.count(UNKNOWN) == 1 else -1
        bytes_of = {
            piece: i for i, (piece, kind) in enumerate(zip(self.pieces, self.types, strict=True)) if kind == BYTE
        }
        self._byte_ids = [bytes_of.get(f"<0x{byte:02X}>", -1) for byte in range(256)] if byte_fallback else None
        if self.unknown_id < 0 or (self._byte_ids is not None and -1 in self._byte_ids):
            raise PresetError("a SentencePiece model must have one unknown piece, and with byte fallback all 256 bytes")
        self._bytes = {f"<0x{byte:02X}>": byte for byte in range(256)} if bytes_of else {}
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}
        self._controls = {p for p, kind in zip(self.pieces, self.types, strict=True) if kind == CONTROL}
        self._strips = bool(_last(normalizer, 4, 1))
        self._has_prefix = bool(_last(normalizer, 3, 1))
        users = [p for p, kind in zip(self.pieces, self.types, strict=True) if kind == USER_DEFINED]
        self._users = sorted(users, key=len, reverse=True)
        self.normalize = Normalizer(
            _bytes(_last(normalizer, 2, b"")),
            add_dummy_prefix=self._has_prefix,
            remove_extra_whitespaces=self._strips,
            space_as_suffix=bool(_last(trainer, 24, 0)),
            protected=users,
        )
        self._prepare()

    def _prepare(self) -> None:
        scores = [s for s, kind in zip(self.scores, self.types, strict=True) if kind == NORMAL]
        largest = max([_SMALLEST_FLOAT, *scores])
        self._unknown = self.unknown_id, _round(min(scores, default=0.0) - _UNKNOWN_PENALTY)
        self._segments: dict[str, tuple[int, float]] = {}
        self._reach: dict[str, int] = {}  # the longest piece that starts with these two characters
        words = True
        for i, (piece, kind) in enumerate(zip(self.pieces, self.types, strict=True)):
            if kind in (NORMAL, USER_DEFINED) or (kind == UNUSED and self.kind == _BPE):
                score = (
                    self.scores[i] if kind != USER_DEFINED or self.kind == _BPE else len(piece.encode()) * largest - 0.1
                )
                self._segments[piece] = i, score
                self._reach[piece[:2]] = max(self._reach.get(piece[:2], 0), len(piece))
                words &= SPACE not in piece[1:]
        # Where no piece goes on past a space, words can be segmented by themselves.
        self._words: dict[str, _Word] | None = {} if words and not self._users else None

    def encode(self, text: str) -> list[int]:
        """Ids, without any special token."""
        ids = self.segment(text)[1]
        if self.unknown_id in ids:  # a run of unknown characters is one unknown piece
            unknown = self.unknown_id
            ids = [i for n, i in enumerate(ids) if i != unknown or n == 0 or ids[n - 1] != unknown]
        return ids

    def segment(self, text: str) -> tuple[str, list[int]]:
        """(normalised text, its ids); here every unknown character has an id of its own."""
        normal = self.normalize(text)
        ids = self._by_words(normal) if self._words is not None else None
        if ids is None:
            ids = self._segment_bpe(normal) if self.kind == _BPE else self._segment_unigram(normal)
        return normal, ids

    def _by_words(self, text: str) -> list[int] | None:
        """None where a word is too long to be kept, or rounding may matter."""
        assert self._words is not None
        ids: list[int] = []
        total = 0.0
        for word in _WORDS.findall(text):
            known = self._words.get(word)
            if known is None:
                if len(word) > _MAX_WORD:
                    return None
                if len(self._words) >= _KEPT_WORDS:
                    self._words.clear()
                known = self._words[word] = self._word(word)
            total -= known.score
            if total > known.limit:
                return None
            ids += known.ids
        return ids

    def _word(self, word: str) -> _Word:
        if self.kind == _BPE:
            return _Word(self._segment_bpe(word), 0.0, float("inf"))
        size = len(word)
        best = [0.0] + [float("-inf")] * size
        came: list[tuple[int, int]] = [(0, 0)] * (size + 1)
        edges = []
        for start in range(size):
            for end, i, score in self._edges(word, start):
                edges.append((start, end, score))
                if best[start] + score > best[end]:
                    best[end], came[end] = best[start] + score, (start, i)
        after = [float("-inf")] * size + [0.0]
        for start, end, score in reversed(edges):
            after[start] = max(after[start], score + after[end])
        ids, ends = [], set()
        end = size
        while end:
            start, i = came[end]
            ends.add((start, end))
            ids.append(i)
            end = start
        others = (best[start] + score + after[end] for start, end, score in edges if (start, end) not in ends)
        margin = best[size] - max(others, default=float("-inf"))
        return _Word(self._unpacked(word, ids[::-1]), best[size], margin / (_ROUNDING * (size + 1)))

    def _unpacked(self, word: str, ids: list[int]) -> list[int]:
        """Unknown characters as bytes, where the model has those. An unknown id always stands for one character."""
        if self._byte_ids is None or self.unknown_id not in ids:
            return ids
        out: list[int] = []
        place = 0
        for i in ids:
            if i == self.unknown_id:
                out += [self._byte_ids[byte] for byte in word[place].encode()]
                place += 1
            else:
                out.append(i)
                place += len(self.pieces[i])
        return out

    def _edges(self, text: str, start: int) -> list[tuple[int, int, float]]:
        """(end, id, score) of every piece that starts here, shortest first; unknown is what no piece of length 1 is."""
        segments = self._segments
        i, score = segments.get(text[start], self._unknown)
        edges = [(start + 1, i, score)]
        for end in range(start + 2, min(start + self._reach.get(text[start : start + 2], 0), len(text)) + 1):
            found = segments.get(text[start:end])
            if found is not None:
                edges.append((end, *found))
        return edges

    def _segment_unigram(self, text: str) -> list[int]:
        """sentencepiece's `EncodeOptimized`: sums are rounded to fp32, a tie goes to the longer last piece."""
        size = len(text)
        best = array("f", bytes(4 * (size + 2)))  # the last is there to round in
        came: list[tuple[int, int] | None] = [None] * (size + 1)
        for start in range(size):
            so_far = best[start]
            for end, i, score in self._edges(text, start):
                best[-1] = so_far + score
                if came[end] is None or best[-1] > best[end]:
                    best[end], came[end] = best[-1], (start, i)
        ids: list[int] = []
        end = size
        while end:
            found = came[end]
            assert found is not None  # every character has an edge to the next one
            end = found[0]
            ids.append(found[1])
        return self._unpacked(text, ids[::-1])

    def _segment_bpe(self, text: str) -> list[int]:
        """Merges the pair whose piece has the best score, the leftmost of equals, until no pair is a piece."""
        symbols, frozen = self._symbols(text)
        before, behind = list(range(-1, len(symbols) - 1)), [*range(1, len(symbols)), -1]
        agenda: list[tuple[float, int, int, str]] = []
        halves: dict[str, tuple[str, str]] = {}

        def consider(left: int, right: int) -> None:
            if left < 0 or right < 0 or frozen[left] or frozen[right]:
                return
            piece = symbols[left] + symbols[right]
            found = self._segments.get(piece)
            if found is not None:
                heapq.heappush(agenda, (-found[1], left, right, piece))
                if self.types[found[0]] == UNUSED:
                    halves[piece] = symbols[left], symbols[right]

        for right in range(1, len(symbols)):
            consider(right - 1, right)
        while agenda:
            _, left, right, piece = heapq.heappop(agenda)
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != len(piece):
                continue
            symbols[left], symbols[right] = piece, ""
            behind[left] = behind[right]
            if behind[right] >= 0:
                before[behind[right]] = left
            consider(before[left], left)
            consider(left, behind[left])
        ids: list[int] = []
        for symbol in symbols:
            if symbol:
                self._resegment(symbol, halves, ids)
        return ids

    def _symbols(self, text: str) -> tuple[list[str], list[bool]]:
        """Characters, and user-defined symbols, which never merge."""
        if not any(user in text for user in self._users):
            return list(text), [False] * len(text)
        symbols, frozen, start = [], [], 0
        while start < len(text):
            user = next((user for user in self._users if text.startswith(user, start)), "")
            symbols.append(user or text[start])
            frozen.append(bool(user))
            start += len(symbols[-1])
        return symbols, frozen

    def _resegment(self, symbol: str, halves: dict[str, tuple[str, str]], ids: list[int]) -> None:
        """Pieces marked as unused fall apart again into what they were merged from."""
        i = self.ids.get(symbol, self.unknown_id)
        if self.types[i] == UNUSED and symbol in halves:
            for half in halves[symbol]:
                self._resegment(half, halves, ids)
        elif i == self.unknown_id and self._byte_ids is not None:
            ids += [self._byte_ids[byte] for byte in symbol.encode()]
        else:
            ids.append(i)

    def decode(self, pieces: Sequence[str]) -> str:
        """Text of pieces, unknown ones as they are."""
        text, run = "", bytearray()
        leading = self._strips or self._has_prefix
        for place, piece in enumerate(pieces):
            if piece in self._bytes:
                run.append(self._bytes[piece])
                continue
            if run:
                text, run = text + _utf8(run), bytearray()
            if text and not self._bytes:
                return text + "".join(p for p in pieces[place:] if p not in self._controls).replace(SPACE, " ")
            if piece in self._controls:
                continue
            if not text and leading and piece.startswith(SPACE):
                piece = piece[1:]
                leading = self._strips
            text += piece.replace(SPACE, " ")
        return text + _utf8(run)


def _utf8(data: bytearray) -> str:
    """As sentencepiece: every byte that belongs to no valid character is one replacement character."""
    text, start = "", 0
    while start < len(data):
        try:
            return text + data[start:].decode()
        except UnicodeDecodeError as error:
            text += data[start : start + error.start].decode() + "\N{REPLACEMENT CHARACTER}"
            start += error.start + 1
    return text


def _round(value: float) -> float:
    """To fp32."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def _read_pieces(messages: list[int | bytes]) -> tuple[list[str], list[float], list[int]]:
    if not 0 < len(messages) <= _MAX_PIECES:
        raise PresetError(f"a SentencePiece model must have 1 to {_MAX_PIECES} pieces. Received: {len(messages)}")
    pieces, scores, types = [], [], []
    for message in messages:
        fields = _parse(_bytes(message))
        try:
            pieces.append(_bytes(_last(fields, 1, b"")).decode())
        except UnicodeDecodeError as error:
            raise PresetError(f"piece {len(pieces)} of a SentencePiece model must be UTF-8: {error}") from error
        score = struct.unpack("<f", struct.pack("<I", _number(_last(fields, 2, 0)) & 0xFFFFFFFF))[0]
        kind = _number(_last(fields, 3, NORMAL))
        if not pieces[-1] or not abs(score) < float("inf") or not NORMAL <= kind <= BYTE:
            raise PresetError(
                "every piece of a SentencePiece model must have a text, a finite score and a known type. Received: "
                f"{pieces[-1]!r}, {score}, {kind}"
            )
        scores.append(score)
        types.append(kind)
    if len(set(pieces)) != len(pieces):
        raise PresetError("the pieces of a SentencePiece model must differ from each other")
    return pieces, scores, types


def _parse(data: bytes) -> Fields:
    """The fields of one protobuf message: {number: [varints and fixed numbers as int, the rest as bytes]}."""
    fields: Fields = {}
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, wire = key >> 3, key & 7
        value: int | bytes
        if wire == 0:
            value, place = _varint(data, place)
        else:
            if wire == 2:
                size, place = _varint(data, place)
            else:
                size = {1: 8, 5: 4}.get(wire, -1)
            if size < 0 or size > len(data) - place or number == 0:
                raise PresetError("a SentencePiece model must be a complete protobuf message")
            value = data[place : place + size]
            place += size
            if wire != 2:
                value = int.from_bytes(value, "little")
        fields.setdefault(number, []).append(value)
    return fields


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            break
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise PresetError("a SentencePiece model must be a complete protobuf message")


def _last(fields: Fields, number: int, default: int | bytes) -> int | bytes:
    return fields.get(number, [default])[-1]


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise PresetError("a SentencePiece model must hold a string where a number was found")
    return value


def _number(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise PresetError("a SentencePiece model must hold a number where a string was found")
    return value
