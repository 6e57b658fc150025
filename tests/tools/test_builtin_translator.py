"""The built-in translator as shipped, its sample, and the pieces of the scripts that made them."""

import json
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from s2s_ray import Seq2SeqLM, presets
from s2s_ray.metrics import chrf
from s2s_ray.pipelines.command import TRANSLATION_SAMPLE, translate_defaults
from s2s_ray.pipelines.settings import parse
from s2s_ray.text.segment import segment

ROOT = Path(__file__).parents[2]
PRESET = presets.BUILTIN_DIRECTORY / presets.DEFAULT_TRANSLATOR
LANGUAGES = ("de", "fr", "es")
sys.path.insert(0, str(ROOT / "tools" / "builtin_preset"))

import data  # noqa: E402
import translation_data as pairs  # noqa: E402


@pytest.fixture(scope="module")
def sample() -> list[dict[str, str]]:
    return ds.dataset(TRANSLATION_SAMPLE, format="parquet", exclude_invalid_files=True).to_table().to_pylist()


@pytest.fixture(scope="module")
def task() -> Seq2SeqLM:
    return Seq2SeqLM.from_preset(presets.DEFAULT_TRANSLATOR)


def test_the_sample_is_real_rows_in_unequal_files(sample):
    sizes = [pq.read_metadata(path).num_rows for path in sorted(TRANSLATION_SAMPLE.glob("*.parquet"))]
    assert len(set(sizes)) == len(sizes) == 3
    assert sum(sizes) == len({row["description"] for row in sample}) == 200
    assert set(sample[0]) == {"package", "description", *LANGUAGES}
    assert all(row["description"] and row["de"] for row in sample)


def test_the_sample_is_held_out_for_both_built_in_presets(sample):
    """The summariser's sample is its whole test split, and the translator's is the same."""
    folder = TRANSLATION_SAMPLE.with_name("package_descriptions")
    held_out = ds.dataset(folder, format="parquet", exclude_invalid_files=True).to_table(["description"])
    assert {row["description"] for row in sample} <= set(held_out.column("description").to_pylist())


def test_the_job_without_flags_is_the_sample_to_german(task):
    settings = parse([], "", translate_defaults([]))
    assert (settings.segment, settings.preset) == ("sentence", presets.DEFAULT_TRANSLATOR)
    assert settings.input == (str(TRANSLATION_SAMPLE),)
    assert settings.summary_column == "translation"
    assert (task.preprocessor.source_lang, task.preprocessor.target_lang) == ("en", "de")
    own = parse(["--input", "in", "--output", "out"], "", translate_defaults(["--input"]))
    assert (own.text_column, own.segment) == ("text", "sentence")


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_shipped_preset_is_small_and_beats_the_source(sample, task, language):
    assert (PRESET / "model.safetensors").stat().st_size <= 16_000_000
    rows = [row for row in sample if row[language]][::7][:10]
    cut = [segment(row["description"]) for row in rows]
    sentences = [" ".join(sentence.split()) for segments in cut for sentence in segments.sentences]
    translated = iter(task.generate(sentences, target_lang=language, num_beams=1))
    ours = [segments.join([next(translated) for _ in segments.sentences]) for segments in cut]
    references = [row[language] for row in rows]
    copied = [row["description"] for row in rows]
    assert chrf(ours, references, resamples=2).value > chrf(copied, references, resamples=2).value + 10


def test_the_shipped_tokenizer_is_the_same_in_transformers(sample, task):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(PRESET)
    texts = [row["description"][:300] for row in sample[:50]]
    ours = task.preprocessor.encode_sources(texts, 256, task.preprocessor.routes(len(texts), "en", "fr"))[0]
    assert ours == theirs([f">>fr<<{text}" for text in texts], truncation=True, max_length=256)["input_ids"]


def test_the_preset_knows_its_languages(task):
    languages = task.preprocessor.languages
    assert (languages.convention, languages.sources) == ("target_token", ["en"])
    assert sorted(languages.tokens) == sorted(LANGUAGES)
    assert json.loads((PRESET / "generation_config.json").read_text())["num_beams"] == 4


def test_texts_are_aligned_where_both_have_as_many_parts():
    english = "A tool. It reads files.\n\n* one\n* two\n\nNot translated in parts. Really."
    german = "Ein Werkzeug. Es liest Dateien.\n\n* eins\n* zwei\n\nNur ein Satz."
    assert list(pairs.aligned(english, german, "de")) == [
        ("sentence", "A tool.", "Ein Werkzeug."),
        ("sentence", "It reads files.", "Es liest Dateien."),
        ("paragraph", "A tool. It reads files.", "Ein Werkzeug. Es liest Dateien."),
        ("sentence", "one", "eins"),
        ("sentence", "two", "zwei"),
        ("paragraph", "Not translated in parts. Really.", "Nur ein Satz."),
    ]
    assert list(pairs.aligned(english, "Anders gegliedert.", "de")) == []


def test_one_target_per_source_and_nothing_left_in_english():
    def row(source: str, target: str, language: str = "de") -> pairs.Row:
        return pairs.Row(language, source, target, "sentence", "p")

    rows = [row("a word", "ein Wort"), row("a word", "das Wort"), row("a word", "das Wort"), row("a word", "un", "fr")]
    rows += [row("left in English", "left in English"), row("12", "12"), row("a", "viel zu lang " * 9), row("Qt", "Qt")]
    assert [r[:3] for r in pairs.one_target(rows)] == [
        ("de", "a word", "das Wort"),
        ("fr", "a word", "un"),
        ("de", "Qt", "Qt"),
    ]


def catalogue(messages: Sequence[tuple[str, str]]) -> bytes:
    """A .mo file."""
    texts = [[text.encode() for text in side] for side in zip(("", "Project: x\n"), *messages, strict=True)]
    count = len(texts[0])
    position = 28 + 16 * count
    tables, strings = b"", b""
    for side in texts:
        for text in side:
            tables += struct.pack("<2I", len(text), position + len(strings))
            strings += text + b"\0"
    return struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0) + tables + strings


def test_messages_of_a_catalogue():
    content = [
        ("cannot open the file", "kann die\nDatei nicht öffnen"),
        ("%d file was read\0%d files were read", "%d Datei wurde gelesen\0%d Dateien wurden gelesen"),
        ("_Open the file now", "_Datei jetzt öffnen"),
        ("menu\x04an entry of it", "ein Eintrag"),
        ("two words", "zwei Wörter"),
    ]
    found = [row[1:3] for row in pairs.messages(catalogue(content), "de", "p")]
    assert found == [
        ("cannot open the file", "kann die Datei nicht öffnen"),
        ("%d file was read", "%d Datei wurde gelesen"),
    ]


def test_a_line_of_no_break_space_is_inside_a_stanza(tmp_path):
    (tmp_path / "list").write_text("Package: a\nDescription-fr: court\n long\n \xa0\n plus\n\nPackage: b\n")
    first, second = data.stanzas(tmp_path / "list")
    assert data.readable(first["Description-fr"].partition("\n")[2]) == "long\n\nplus"
    assert second == {"Package": "b"}
