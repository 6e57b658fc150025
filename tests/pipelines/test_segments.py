"""Rows cut into sentences, with languages of their own, and put together again. No Ray, no model."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from row_helpers import echo, prepare, process

from s2s_ray.errors import InputError, LanguageError, SettingsError
from s2s_ray.pipelines.generate import prepare as prepare_job
from s2s_ray.pipelines.replica import MAX_ROW_BITS, _requests
from s2s_ray.pipelines.rows import ANSWER_SCHEMA, WORK_SCHEMA, make_shard, read_unit
from s2s_ray.pipelines.settings import GenerateSettings
from s2s_ray.text.preprocessor import Seq2SeqLMPreprocessor

TEXTS = [
    "One sentence. Another one!\n\nA paragraph:\n * an item\n * a second item.\n",
    "\n 1. Numbered  \n",
    "Only one",
    "--- 12 ---",
    "",
]


def sources(work: pa.Table, directory: Path) -> list[str]:
    """What the model would read, language tokens included."""
    tokenizer = Seq2SeqLMPreprocessor.from_directory(directory).tokenizer
    rows = [ids or [] for ids in work.column("token_ids").to_pylist()]
    return [tokenizer._backend.library.decode(ids[1:-1], skip_special_tokens=False) for ids in rows]


def test_sentences_are_read_alone_and_come_back_in_their_places(tiny_bart_dir: Path, tmp_path: Path) -> None:
    job, (unit,) = prepare(tiny_bart_dir, pa.table({"text": TEXTS, "id": range(5)}), tmp_path, segment="sentence")
    work, _ = read_unit(unit, job)
    assert work.column("row").to_pylist() == [0, 0, 0, 0, 0, 1, 2, 3, 4]
    assert work.column("segment").to_pylist() == [0, 1, 2, 3, 4, 0, 0, 0, 0]
    assert sources(work, tiny_bart_dir) == [
        *("One sentence.", "Another one!", "A paragraph:", "an item", "a second item."),
        *("Numbered", "Only one", "", ""),
    ]
    data, errors = process(job, unit)
    assert (data.column("summary").to_pylist(), errors.num_rows) == (TEXTS, 0)
    assert data.column("id").to_pylist() == list(range(5))
    assert data.column("finish_reason").to_pylist() == ["stop", "stop", "stop", "empty", "empty"]
    tokens = [len(ids or []) for ids in work.column("token_ids").to_pylist()]
    assert data.column("num_tokens").to_pylist() == [sum(tokens[:5]), *tokens[5:]]


def test_a_row_sums_up_its_sentences(tiny_bart_dir: Path, tmp_path: Path) -> None:
    table = pa.table({"text": ["One. Two. Three.", "Four.", "12", "Five. Six.", None]})
    job, (unit,) = prepare(tiny_bart_dir, table, tmp_path, segment="sentence", score=True, max_error_rate=1.0)
    work, carried = read_unit(unit, job)
    answers = echo(work).to_pylist()
    assert len(answers) == 8
    answers[1]["finish_reason"], answers[1]["score"] = "length", -2.5
    answers[6] = {"reason": "NONFINITE", "message": "bad sums"}
    shard = make_shard(unit, work, carried, pa.Table.from_pylist(answers, schema=ANSWER_SCHEMA), 1, job)
    data = pa.parquet.read_table(pa.BufferReader(shard.data))
    assert data.column("finish_reason").to_pylist() == ["length", "stop", "empty"]
    assert data.column("score").to_pylist() == [-4.5, -1.0, None]
    assert shard.num_tokens == sum(data.column("num_tokens").to_pylist())
    errors = pa.parquet.read_table(pa.BufferReader(shard.errors)).to_pylist()
    assert [(e["row"], e["reason"], e["message"]) for e in errors] == [
        (3, "NONFINITE", "sentence 2 of 2: bad sums"),
        (4, "NULL_TEXT", "the text is null"),
    ]
    assert shard.reasons == {"NONFINITE": 1, "NULL_TEXT": 1}


@pytest.mark.parametrize("on_long", ["truncate", "error", "split"])
def test_long_sentences(tiny_bart_dir: Path, tmp_path: Path, on_long: str) -> None:
    words = ["an", "in", "the", "on"] * 10
    long = f"Short. The {' '.join(words)}, of the {' '.join(words)}. {'x' * 90}"
    options = {"on_long": on_long, "max_source_length": 16, "segment": "sentence"}
    job, (unit,) = prepare(tiny_bart_dir, pa.table({"text": [long, "Short."]}), tmp_path, **options)
    data, errors = process(job, unit)
    lengths = [len(ids) for ids in read_unit(unit, job)[0].column("token_ids").to_pylist() if ids]
    assert max(lengths) <= 16
    if on_long == "split":
        assert data.column("summary").to_pylist() == [long, "Short."]
        assert data.column("truncated").to_pylist() == [False, False]
        assert sum(lengths) < 16 * len(lengths)
    elif on_long == "truncate":
        assert data.column("truncated").to_pylist() == [True, False]
        first = data.column("summary")[0].as_py()
        assert first.startswith("Short. The an in") and len(first) < len(long)
    else:
        assert data.column("summary").to_pylist() == ["Short."]
        assert errors.column("message")[0].as_py().startswith("sentence 2 of 3: ")


def test_bad_rows_are_whole_error_rows(tiny_bart_dir: Path, tmp_path: Path) -> None:
    rows = [b"One. Two.", b"a \xff. b. c.", None, b"one. " * 300_000, b"Three."]
    table = pa.table({"text": pa.array(rows, pa.binary()), "id": range(5)})
    job, (unit,) = prepare(tiny_bart_dir, table, tmp_path, segment="sentence", max_error_rate=1.0)
    data, errors = process(job, unit)
    assert data.column("summary").to_pylist() == ["One. Two.", "Three."]
    assert data.column("id").to_pylist() == [0, 4]
    assert errors.column("reason").to_pylist() == ["INVALID_UTF8", "NULL_TEXT", "TOO_LONG"]


def test_languages_by_row(translator: Path, tmp_path: Path) -> None:
    languages = pa.array(["de", "fra", None, "xx", " ", "fr"]).dictionary_encode()
    table = pa.table({"text": [f"A{i}. B{i}." for i in range(6)], "to": languages})
    options = {"segment": "sentence", "target_lang_column": "to", "source_lang": "en", "columns": ("text",)}
    job, (unit,) = prepare(translator, table, tmp_path, **options)
    work, _ = read_unit(unit, job)
    read = [text for text in sources(work, translator) if text]
    assert read == [
        *(">>de<<A0.", ">>de<<B0.", ">>fr<<A1.", ">>fr<<B1."),
        *(">>fr<<A5.", ">>fr<<B5."),
    ]
    data, errors = process(job, unit)
    assert data.column("summary").to_pylist() == ["A0. B0.", "A1. B1.", "A5. B5."]
    assert data.schema.names == ["text", "summary", "num_tokens", "finish_reason", "truncated"]
    assert errors.column("reason").to_pylist() == ["UNKNOWN_LANGUAGE"] * 3
    messages = errors.column("message").to_pylist()
    assert messages[0] == messages[2] == "the target language is null or empty"
    assert "'xx'" in messages[1] and "de, fr" in messages[1]


def test_a_rows_forced_tokens_go_into_its_request() -> None:
    from s2s_ray.generation.settings import GenerationSettings

    settings = GenerationSettings(eos_token_id=2)
    work = WORK_SCHEMA.empty_table().to_pydict() | {"row": [7, 7, 8, 9], "segment": [0, 3, 0, 0]}
    work = {name: work[name] or [None] * 4 for name in work} | {"token_ids": [[5], [6, 7], None, [8]]}
    wanted, requests = _requests(pa.table(work, schema=WORK_SCHEMA), settings)
    assert wanted == [0, 1, 3]
    assert [(row, list(ids), own) for row, ids, own in requests] == [
        *((7, [5], settings), (7 + 3 * 2**MAX_ROW_BITS, [6, 7], settings), (9, [8], settings))
    ]
    work["forced_bos_token_id"] = [None, 9, None, 9]
    _, requests = _requests(pa.table(work, schema=WORK_SCHEMA).slice(1), settings)
    assert [(row, list(ids)) for row, ids, _ in requests] == [(7 + 3 * 2**MAX_ROW_BITS, [6, 7]), (9, [8])]
    assert requests[0][2] == settings.replace(forced_bos_token_id=9)
    assert requests[0][2] is requests[1][2]


def refused(preset: Path, directory: Path, error: type[Exception], message: str, **changes: Any) -> None:
    with pytest.raises(error, match=message):
        prepare_job(
            GenerateSettings(
                **{"input": (str(directory / "in.parquet"),), "output": str(directory / "out"), "preset": str(preset)}
                | changes
            )
        )


def test_usage_errors_before_any_model(translator: Path, tiny_bart_dir: Path, tmp_path: Path) -> None:
    prepare(translator, pa.table({"text": ["a"], "to": ["de"], "number": [1]}), tmp_path)
    refused(translator, tmp_path, LanguageError, "'xx'. Known: de, fr", target_lang="xx")
    refused(translator, tmp_path, LanguageError, "'de'. Known: en", source_lang="de", target_lang="de")
    refused(translator, tmp_path, LanguageError, "--target-lang.* must say .* Known: de, fr", segment="sentence")
    refused(tiny_bart_dir, tmp_path, LanguageError, "this preset has no languages", target_lang="de")
    refused(tiny_bart_dir, tmp_path, LanguageError, "need a preset that has languages", target_lang_column="to")
    refused(translator, tmp_path, InputError, "--target-lang-column must name a column", target_lang_column="lang")
    refused(translator, tmp_path, InputError, "--target-lang-column must be string", target_lang_column="number")
    both = {"target_lang": "de", "target_lang_column": "to"}
    refused(
        translator,
        tmp_path,
        SettingsError,
        "--target-lang must be left out where --target-lang-column",
        **both,
    )
    refused(translator, tmp_path, SettingsError, "--on-long must be truncate or error without", on_long="split")
    assert (
        prepare_job(
            GenerateSettings(
                input=(str(tmp_path / "in.parquet"),),
                output=str(tmp_path / "out"),
                preset=str(translator),
                segment="sentence",
                target_lang_column="to",
            )
        ).document["segment"]
        == "sentence"
    )


def test_every_new_setting_is_in_the_fingerprint() -> None:
    base = {"input": ("in",), "output": "out", "preset": "p", "segment": "sentence"}
    plain = GenerateSettings(**base).identity()
    changes: list[dict[str, Any]] = [
        {"source_lang": "en"},
        {"target_lang": "de"},
        {"source_lang_column": "from"},
        {"target_lang_column": "to"},
        {"segment": "none"},
        {"on_long": "split"},
    ]
    assert all(GenerateSettings(**base | change).identity() != plain for change in changes)
