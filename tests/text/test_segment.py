"""Cutting a text into sentences loses nothing, whatever the text is."""

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2s_ray.pipelines.command import SAMPLE
from s2s_ray.text.segment import halve, segment


@pytest.mark.parametrize(
    ("text", "sentences", "gaps"),
    [
        ("One. Two!\n\nThree", ("One.", "Two!", "Three"), ("", " ", "\n\n", "")),
        ("Mr. Smith, e.g. this\none.  Next.", ("Mr. Smith, e.g. this\none.", "Next."), ("", "  ", "")),
        ("It has:\n * a part\n * b.\n", ("It has:", "a part", "b."), ("", "\n * ", "\n * ", "\n")),
        ("\t 1. Install it.\r\n", ("Install it.",), ("\t 1. ", "\r\n")),
        ("今日は。いい天気です。", ("今日は。", "いい天気です。"), ("", "", "")),
        ("--- 12.5 ---\n\nText", ("Text",), ("--- 12.5 ---\n\n", "")),
        (" \n", (), (" \n",)),
        ("", (), ("",)),
    ],
)
def test_sentences_and_what_stands_between_them(text, sentences, gaps):
    found = segment(text)
    assert (found.sentences, found.gaps) == (sentences, gaps)


@given(st.lists(st.sampled_from(["Text", "a b", ".", "!", "?", "\n", "\r", " ", "* ", "3) ", "。", "é", "\0", "Dr."])))
def test_nothing_is_lost(parts):
    text = "".join(parts)
    found = segment(text)
    assert found.join(found.sentences) == text
    assert all(sentence and sentence == sentence.strip() for sentence in found.sentences)


def test_nothing_is_lost_on_real_and_on_long_text():
    texts = [t for file in sorted(SAMPLE.glob("*.parquet")) for t in pq.read_table(file)["description"].to_pylist()]
    found = [segment(text) for text in texts]
    assert [f.join(f.sentences) for f in found] == texts
    assert sum(len(f.sentences) for f in found) > 3 * len(texts)
    long = "\n\n".join(texts[:400])  # the library itself drops some breaks beyond 10,000 characters
    cut = segment(long)
    assert cut.join(cut.sentences) == long
    assert len(cut.sentences) > 1000


def test_translations_take_the_places_of_the_sentences():
    found = segment("One. Two.\n\n* Three")
    assert found.join(["Eins.", "Zwei.", "Drei"]) == "Eins. Zwei.\n\n* Drei"
    with pytest.raises(ValueError):
        found.join(["Eins."])


def test_an_unknown_language_has_the_general_rules():
    assert segment("A first. A second.", "zxx_Latn").sentences == ("A first.", "A second.")


@pytest.mark.parametrize(
    ("sentence", "parts"),
    [
        ("one two, three four", ("one two,", " ", "three four")),
        ("one two three four five six, x", ("one two three", " ", "four five six, x")),
        ("日本語、日本語", ("日本語、", "", "日本語")),
        ("abcd", ("ab", "", "cd")),
        ("ab", ("a", "", "b")),
    ],
)
def test_halves(sentence, parts):
    assert halve(sentence) == parts


@given(st.text("ab ,;、é\n", min_size=2).map(str.strip).filter(lambda s: len(s) > 1))
def test_halves_are_not_empty_and_lose_nothing(sentence):
    left, gap, right = halve(sentence)
    assert left + gap + right == sentence
    assert left and right
