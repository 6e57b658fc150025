"""SentencePiece's text normalisation: the longest-match replacements of a precompiled map, then its rules of spaces.

The map (`precompiled_charsmap` of a model file) is a Darts double array of UTF-8 keys that points into a block of
NUL-terminated replacements. It is read once into a dictionary, with every size checked, and applied by one compiled
regular expression; the `tokenizers` library replaces whole grapheme clusters, which loses combining marks.
"""

import re
import struct
from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from s2s_ray.errors import PresetError

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
MAX_KEY_BYTES = 128
MAX_KEYS = 2**20
_BYTES = [bytes([label]) for label in range(256)]


class Normalizer:
    """Text to the string that a SentencePiece model segments: replaced characters, spaces written as U+2581."""

    def __init__(
        self,
        charsmap: bytes,
        *,
        add_dummy_prefix: bool,
        remove_extra_whitespaces: bool,
        space_as_suffix: bool,
        protected: Iterable[str] = (),
    ) -> None:
        self._map = read_charsmap(charsmap) if charsmap else {}
        self._longest = max(map(len, self._map), default=0)
        self._add_dummy_prefix = add_dummy_prefix
        self._remove_extra = remove_extra_whitespaces
        self._suffix = space_as_suffix
        self._protected = frozenset(protected)  # user-defined symbols, which stay as they are
        if self._map:
            self._touched, self._pattern = self._compile()

    def _compile(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """(finds whether anything may be replaced, finds each stretch in which something may be)."""
        long = [key for key in self._map if len(key) > 1]
        single = _char_class({key for key in self._map if len(key) == 1})
        first, later = _char_class({key[0] for key in long}), _char_class(set("".join([key[1:] for key in long])))
        parts = [re.escape(symbol) for symbol in sorted(self._protected, key=len, reverse=True)]
        parts += [f"{first}{later}+"] if long else []
        parts += [single] if single else []
        return re.compile("|".join(c for c in (later, single) if c)), re.compile("|".join(parts))

    def __call__(self, text: str) -> str:
        """The normalised text; "" for text of nothing but spaces where those are removed."""
        given = text
        if self._map and self._touched.search(text):
            text = self._pattern.sub(self._replace, text)
        if self._remove_extra:
            text = text.lstrip(" ")
            if "  " in text:
                text = re.sub(" +", " ", text)
        if not text and (self._remove_extra or not given):
            return ""
        text = text.replace(" ", SPACE)
        if self._add_dummy_prefix and not self._suffix:
            text = SPACE + text
        if self._remove_extra:
            text = text.rstrip(SPACE)
        return text + SPACE if self._add_dummy_prefix and self._suffix else text

    def _replace(self, match: re.Match[str]) -> str:
        text = match[0]
        if text in self._protected:
            return text
        out, start = [], 0
        while start < len(text):
            for end in range(min(len(text), start + self._longest), start, -1):
                replacement = self._map.get(text[start:end])
                if replacement is not None:
                    out.append(replacement)
                    start = end
                    break
            else:
                out.append(text[start])
                start += 1
        return "".join(out)


@lru_cache(maxsize=4)  # the models of a preset mostly share one
def read_charsmap(blob: bytes) -> dict[str, str]:
    """{text: replacement} of a precompiled map. Raises PresetError for one that is damaged or too large."""
    size = struct.unpack("<I", blob[:4])[0] if len(blob) >= 4 else 0
    if size % 4 or not 0 < size <= len(blob) - 4:
        raise PresetError(f"the charsmap must hold a trie of its stated size. Received: {size} of {len(blob)} bytes")
    units = np.frombuffer(blob, "<u4", size // 4, 4)
    values = blob[4 + size :]
    replacements: dict[str, str] = {}
    try:
        for key, index in _trie_items(units):
            end = values.index(b"\0", index)
            replacements[key.decode()] = values[index:end].decode()
    except (UnicodeDecodeError, ValueError) as error:
        raise PresetError(f"the charsmap must map UTF-8 to UTF-8: {error}") from error
    return replacements


def _trie_items(units: NDArray[np.uint32]) -> Iterator[tuple[bytes, int]]:
    """(key, value) of a Darts double array, breadth first. A unit holds a label, a leaf flag and an offset; the child
    of a node for a byte is at (node xor offset) xor byte, if its label is that byte.
    """
    labels = (units & 0x800000FF).astype(np.int64)
    labelled = np.flatnonzero((labels > 0) & (labels < 256))
    parents = labelled ^ labels[labelled]
    order = np.argsort(parents, kind="stable")
    labelled, parents = labelled[order], parents[order]
    nodes, keys, found = np.zeros(1, np.int64), [b""], 0
    for _ in range(MAX_KEY_BYTES):
        unit = units[nodes].astype(np.int64)
        bases = nodes ^ ((unit >> 10) << ((unit & (1 << 9)) >> 6))
        leaves = np.flatnonzero(((unit >> 8) & 1).astype(bool) & (bases < len(units)))
        yield from zip((keys[i] for i in leaves.tolist()), (units[bases[leaves]] & 0x7FFFFFFF).tolist(), strict=True)
        starts = np.searchsorted(parents, bases, "left")
        counts = np.searchsorted(parents, bases, "right") - starts
        found += len(leaves)
        if not counts.any():
            return
        if found + int(counts.sum()) > MAX_KEYS:
            break
        rows = np.repeat(np.arange(len(nodes)), counts)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        nodes = labelled[starts[rows] + within]
        pairs = zip(rows.tolist(), labels[nodes].tolist(), strict=True)
        keys = [keys[row] + _BYTES[label] for row, label in pairs]
    raise PresetError(f"the charsmap must hold at most {MAX_KEYS} keys of at most {MAX_KEY_BYTES} bytes")


def _char_class(characters: set[str]) -> str:
    """Of these characters; of all beyond the basic plane if one is, as `re` looks up only that plane by a table."""
    inner = "".join(c for c in characters if c <= "\uffff")
    astral = "\U00010000-\U0010ffff" if len(inner) < len(characters) else ""
    return f"[{re.escape(inner)}{astral}]" if inner or astral else ""
