"""A text cut into sentences, and put together again with everything that stood between them.

The boundaries are sentencex's (Wikimedia's rules for about 300 languages; MIT). What is not language goes to the gaps:
white space, paragraph breaks, the bullet or number of a list item, and lines without a letter.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

LETTER = re.compile(r"[^\W\d_]")
BULLET = re.compile(r"(?:[-*+•·‣▪o]|\d{1,3}[.)])\s+")
CLAUSE = re.compile(r"(?<=[,;:،؛])\s+|(?<=[，、；：])")
SPACE = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class Segments:
    """`gaps[0] + sentences[0] + gaps[1] + ... + gaps[-1]` is the text, character by character."""

    sentences: tuple[str, ...]
    gaps: tuple[str, ...]  # one more than sentences

    def join(self, sentences: Sequence[str]) -> str:
        """The text with these sentences in place of its own. Raises ValueError for another number of them."""
        parts = [self.gaps[0]]
        for sentence, gap in zip(sentences, self.gaps[1:], strict=True):
            parts += (sentence, gap)
        return "".join(parts)


def segment(text: str, language: str = "en") -> Segments:
    """The sentences of `text`, which is in `language`.

    A code may carry a script or a region (en_XX, deu_Latn); of an unknown language the sentences are cut by the
    general rules. A line break inside a sentence stays in it.
    """
    sentences: list[str] = []
    gaps: list[str] = []
    done = 0  # up to here the text is in sentences and gaps
    position = 0
    for piece in _boundaries(text, language):
        core = piece.strip()
        start = text.find(core, position)
        if start < 0:  # the library changed a character, which it does to a few texts in 100,000
            break
        position = start + len(core)
        bullet = BULLET.match(core)
        start += bullet.end() if bullet else 0
        if LETTER.search(text, start, position):
            gaps.append(text[done:start])
            sentences.append(text[start:position])
            done = position
    rest = text[position:]
    if LETTER.search(rest):
        start = position + len(rest) - len(rest.lstrip())
        gaps.append(text[done:start])
        sentences.append(text[start:].rstrip())
        done = start + len(sentences[-1])
    gaps.append(text[done:])
    return Segments(tuple(sentences), tuple(gaps))


def halve(sentence: str) -> tuple[str, str, str]:
    """(left, gap, right) of a sentence of at least two characters: together they are the sentence.

    Cut between clauses if one ends in its middle half, else at the white space nearest to the middle, else between two
    characters.
    """
    size = len(sentence)
    for pattern, margin in ((CLAUSE, size // 4), (SPACE, 0)):
        cuts = [cut.span() for cut in pattern.finditer(sentence) if margin < cut.start() and cut.end() < size - margin]
        if cuts:
            start, end = min(cuts, key=lambda cut: abs(sum(cut) - size))
            return sentence[:start], sentence[start:end], sentence[end:]
    return sentence[: size // 2], "", sentence[size // 2 :]


def _boundaries(text: str, language: str) -> list[str]:
    import sentencex

    pieces: list[str] = sentencex.segment(_base_code(language), text)
    return pieces


@lru_cache(maxsize=256)
def _base_code(language: str) -> str:
    return re.split(r"[_-]", language, maxsplit=1)[0].lower() or "en"
