"""The preprocessor: KerasHub's shapes, transformers' ids, and rows made to hurt."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from s2s_ray.errors import InputError, PresetError, RowErrorReason, SettingsError
from s2s_ray.text.preprocessor import EncodedSource, Seq2SeqLMPreprocessor
from s2s_ray.text.tokenizer import TokenizationError

SOURCES = ["The fox was sleeping.", "", "A much longer text, which goes on and on: " + "on and on " * 10]
TARGETS = ["The fox was awake.", "x", ""]


@pytest.fixture(scope="module")
def preprocessor(tiny_bart_dir: Path) -> Seq2SeqLMPreprocessor:
    return Seq2SeqLMPreprocessor.from_directory(tiny_bart_dir)


def test_training_arrays_equal_transformers(preprocessor: Seq2SeqLMPreprocessor, tiny_bart_dir: Path) -> None:
    import torch
    from transformers import AutoTokenizer
    from transformers.models.bart.modeling_bart import shift_tokens_right

    reference = AutoTokenizer.from_pretrained(tiny_bart_dir)
    sources = reference(SOURCES, padding=True, return_tensors="np")
    labels = reference(text_target=TARGETS, padding=True, return_tensors="np")
    x, y, weight = preprocessor({"encoder_text": SOURCES, "decoder_text": TARGETS})
    np.testing.assert_array_equal(x["encoder_token_ids"], sources["input_ids"])
    np.testing.assert_array_equal(x["encoder_padding_mask"], sources["attention_mask"].astype(bool))
    np.testing.assert_array_equal(y, labels["input_ids"])
    np.testing.assert_array_equal(weight, labels["attention_mask"].astype(bool))
    shifted = shift_tokens_right(torch.tensor(labels["input_ids"]), 1, 2)
    np.testing.assert_array_equal(x["decoder_token_ids"], shifted)
    assert {a.dtype for a in (y, x["encoder_token_ids"], x["decoder_token_ids"])} == {np.dtype("int32")}
    assert {a.dtype for a in (weight, x["encoder_padding_mask"], x["decoder_padding_mask"])} == {np.dtype("bool")}


def test_max_length_padding_is_kerashubs(tiny_bart_dir: Path) -> None:
    """KerasHub packs [</s>, <s>, text, </s>, pad...] to T + 1 and cuts x = [:-1], y = [1:], mask and all."""
    packer = Seq2SeqLMPreprocessor.from_directory(
        tiny_bart_dir, encoder_sequence_length=12, decoder_sequence_length=8, padding="max_length"
    )
    a, b = packer.tokenizer("a"), packer.tokenizer("b c d e f g h i j k")
    x, y, weight = packer({"encoder_text": ["a", "b c d e f g h i j k"], "decoder_text": ["a", "b c d e f g h i j k"]})
    packed = np.array([[2, 0, *a, 2, 1, 1, 1, 1, 1], [2, 0, *b[:6], 2]])
    mask = np.array([[True] * 4 + [False] * 5, [True] * 9])
    np.testing.assert_array_equal(x["decoder_token_ids"], packed[:, :-1])
    np.testing.assert_array_equal(x["decoder_padding_mask"], mask[:, :-1])
    np.testing.assert_array_equal(y, packed[:, 1:])
    np.testing.assert_array_equal(weight, mask[:, 1:])
    np.testing.assert_array_equal(x["encoder_token_ids"], [[0, *a, 2, *[1] * 9], [0, *b[:10], 2]])


def test_a_single_string_is_unbatched(preprocessor: Seq2SeqLMPreprocessor) -> None:
    x, y, weight = preprocessor({"encoder_text": "a b", "decoder_text": "c"})
    batch = preprocessor({"encoder_text": ["a b"], "decoder_text": ["c"]})
    assert (y.shape, weight.shape, x["encoder_token_ids"].ndim) == ((3,), (3,), 1)
    np.testing.assert_array_equal(y, batch[1][0])


def test_lengths_of_a_call_win_and_the_alias_works(preprocessor: Seq2SeqLMPreprocessor) -> None:
    x = {"encoder_text": ["word " * 50], "decoder_text": ["word " * 50]}
    for name in ("decoder_sequence_length", "sequence_length"):
        inputs, y, _ = preprocessor(x, encoder_sequence_length=7, **{name: 5})
        assert (inputs["encoder_token_ids"].shape, inputs["decoder_token_ids"].shape, y.shape) == (
            (1, 7),
            (1, 5),
            (1, 5),
        )
        assert (inputs["encoder_token_ids"][0, -1], y[0, -1]) == (2, 2)


def test_truncation_keeps_the_end_and_is_counted(tiny_bart_dir: Path) -> None:
    preprocessor = Seq2SeqLMPreprocessor.from_directory(tiny_bart_dir)
    ids, truncated = preprocessor.encode_sources(["word " * 50, "word"], 6)
    assert (len(ids[0]), ids[0][0], ids[0][-1]) == (6, 0, 2)
    assert truncated == [True, False]
    full = len(preprocessor.tokenizer("word " * 50)) + 2
    assert preprocessor.try_encode_sources(["word " * 50], 6)[0].num_tokens_full == full
    preprocessor.encode_targets(["word " * 50, "word"], 6)
    assert (preprocessor.truncated_sources, preprocessor.truncated_targets) == (2, 1)
    exact = preprocessor.try_encode_sources(["word " * 50], full)[0]
    assert (exact.truncated, len(exact.token_ids)) == (False, full)


def test_prompts_have_no_end_token(preprocessor: Seq2SeqLMPreprocessor) -> None:
    word = preprocessor.tokenizer("word")
    assert preprocessor.encode_prompts(["word", ""]) == [[0, *word], []]
    inputs = preprocessor.generate_preprocess({"encoder_text": ["a", "b"], "decoder_text": ["word", ""]})
    expected = [[2, 0, *word], [2] + [1] * (len(word) + 1)]
    np.testing.assert_array_equal(inputs["decoder_token_ids"], expected)
    np.testing.assert_array_equal(inputs["decoder_padding_mask"].sum(axis=1), [2 + len(word), 1])
    assert preprocessor.generate_postprocess(inputs) == ["word", ""]


@pytest.mark.parametrize(
    "form",
    [
        lambda texts: texts,
        tuple,
        iter,
        np.array,
        lambda texts: np.array(texts, dtype=object),
        pa.array,
        lambda texts: pa.chunked_array([texts[:1], texts[1:]]),
        lambda texts: [t.encode() for t in texts],
        lambda texts: {"encoder_text": texts},
        lambda texts: {"encoder_text": texts, "decoder_text": None},
    ],
)
def test_forms_of_generation_input(preprocessor: Seq2SeqLMPreprocessor, form: Callable[[list[str]], Any]) -> None:
    expected = preprocessor.generate_preprocess(SOURCES)
    received = preprocessor.generate_preprocess(form(SOURCES))
    for name, array in expected.items():
        np.testing.assert_array_equal(received[name], array)


def test_no_rows_and_one_string(preprocessor: Seq2SeqLMPreprocessor) -> None:
    assert preprocessor.generate_preprocess([])["encoder_token_ids"].shape[0] == 0
    single = preprocessor.generate_preprocess("a b")
    assert single["encoder_token_ids"].ndim == single["decoder_token_ids"].ndim == 1
    ids = np.array([0, *preprocessor.tokenizer("a b"), 2, 1])
    output = {"decoder_token_ids": ids, "decoder_padding_mask": ids != 1}
    assert preprocessor.generate_postprocess(output) == "a b"


def test_inputs_are_not_changed(preprocessor: Seq2SeqLMPreprocessor) -> None:
    x = {"encoder_text": list(SOURCES), "decoder_text": list(TARGETS)}
    preprocessor(x)
    preprocessor.generate_preprocess(x)
    assert x == {"encoder_text": SOURCES, "decoder_text": TARGETS}


@pytest.mark.parametrize(
    "x",
    [{"encoder_text": ["a"]}, {"text": ["a"]}, {"encoder_text": ["a"], "decoder_text": ["a", "b"]}, {}],
)
def test_wrong_keys_and_lengths(preprocessor: Seq2SeqLMPreprocessor, x: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="Received"):
        preprocessor(x)


def test_settings_are_checked(tiny_bart_dir: Path, preprocessor: Seq2SeqLMPreprocessor) -> None:
    with pytest.raises(SettingsError, match="encoder_sequence_length"):
        Seq2SeqLMPreprocessor.from_directory(tiny_bart_dir, encoder_sequence_length=2)
    with pytest.raises(SettingsError, match="padding"):
        Seq2SeqLMPreprocessor.from_directory(tiny_bart_dir, padding="left")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no_such"):
        Seq2SeqLMPreprocessor.from_preset(tiny_bart_dir, no_such=1)
    with pytest.raises(InputError, match="decoder_text"):
        preprocessor({"encoder_text": ["a"], "decoder_text": ["b"]}, sample_weight=np.ones(1))


def test_settings_survive_save_and_load(tiny_bart_dir: Path, tmp_path: Path) -> None:
    original = Seq2SeqLMPreprocessor.from_preset(
        str(tiny_bart_dir), encoder_sequence_length=77, decoder_sequence_length=33, source_prefix="summarize: "
    )
    original.save(tmp_path)
    loaded = Seq2SeqLMPreprocessor.from_directory(tmp_path)
    assert (loaded.encoder_sequence_length, loaded.decoder_sequence_length, loaded.sequence_length) == (77, 33, 33)
    assert (loaded.source_prefix, loaded.decoder_start_token_id) == ("summarize: ", 2)
    assert loaded.encode_sources(SOURCES) == original.encode_sources(SOURCES)
    assert Seq2SeqLMPreprocessor.from_directory(tmp_path, source_prefix="").source_prefix == ""


def test_lengths_default_to_the_models_positions(tiny_bart_dir: Path) -> None:
    loaded = Seq2SeqLMPreprocessor.from_directory(tiny_bart_dir)
    assert (loaded.encoder_sequence_length, loaded.decoder_sequence_length) == (128, 128)


def test_a_prefix_is_part_of_the_source_alone(tiny_bart_dir: Path, preprocessor: Seq2SeqLMPreprocessor) -> None:
    prefixed = Seq2SeqLMPreprocessor.from_directory(tiny_bart_dir, source_prefix="summarize: ")
    with_text = preprocessor.encode_sources(["summarize: " + text for text in SOURCES])
    assert prefixed.encode_sources(SOURCES) == with_text
    assert prefixed.encode_targets(TARGETS) == preprocessor.encode_targets(TARGETS)


def test_the_start_token_must_be_known(tiny_bart_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_bart_dir / "tokenizer.json", tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 2, "pad_token_id": 1}')
    with pytest.raises(PresetError, match="decoder_start_token_id"):
        Seq2SeqLMPreprocessor.from_directory(tmp_path)


POISON: list[tuple[Any, RowErrorReason | None]] = [
    (None, RowErrorReason.NULL_TEXT),
    (float("nan"), RowErrorReason.NULL_TEXT),
    (3, RowErrorReason.TOKENIZER_FAILED),
    (2.5, RowErrorReason.TOKENIZER_FAILED),
    (True, RowErrorReason.TOKENIZER_FAILED),
    (["a"], RowErrorReason.TOKENIZER_FAILED),
    ({"a": 1}, RowErrorReason.TOKENIZER_FAILED),
    (b"\xff\xfe", RowErrorReason.INVALID_UTF8),
    (b"\xed\xa0\x80", RowErrorReason.INVALID_UTF8),
    ("\ud800", RowErrorReason.INVALID_UTF8),
    ("text \udfff text", RowErrorReason.INVALID_UTF8),
    ("\ud83d", RowErrorReason.INVALID_UTF8),
    ("x" * (2**20 + 1), RowErrorReason.TOO_LONG),
    ("é" * (2**19 + 1), RowErrorReason.TOO_LONG),
    ("x" * 2**20, None),
    ("", None),
    (" ", None),
    ("\n\n\t", None),
    ("\0", None),
    ("a\0b", None),
    ("\ufeff", None),
    ("\u202e\u200d\u200b", None),
    ("😀" * 100, None),
    ("👩‍👩‍👧‍👦", None),
    ("e" + "\u0301" * 1000, None),
    ("</s><s><pad>", None),
    ("<mask>", None),
    (b"bytes", None),
    ("\U0010ffff", None),
    ("﷽" * 50, None),
]


@pytest.mark.parametrize("position", [0, 1, 3])
def test_a_bad_row_has_its_reason_and_disturbs_no_other(preprocessor: Seq2SeqLMPreprocessor, position: int) -> None:
    neighbours = preprocessor.try_encode_sources(SOURCES)
    for text, reason in POISON:
        rows = preprocessor.try_encode_sources([*SOURCES[:position], text, *SOURCES[position:]])
        bad = rows.pop(position)
        assert rows == neighbours
        assert bad.error == reason, repr(text)[:40]
        assert bool(bad.token_ids) == (reason is None)
        assert bool(bad.message) == (reason is not None)
        assert len(bad.message) <= 512


def test_encode_sources_names_the_row(preprocessor: Seq2SeqLMPreprocessor) -> None:
    with pytest.raises(TokenizationError, match="text 1 ") as raised:
        preprocessor.encode_sources(["a", "\ud800", None])  # type: ignore[list-item]
    assert (raised.value.row, raised.value.reason) == (1, RowErrorReason.INVALID_UTF8)
    with pytest.raises(TokenizationError) as raised:
        preprocessor.encode_targets(["a", "b", None])  # type: ignore[list-item]
    assert (raised.value.row, raised.value.reason) == (2, RowErrorReason.NULL_TEXT)


def test_a_panic_in_the_library_fails_its_row_only(tiny_bart_dir: Path) -> None:
    preprocessor = Seq2SeqLMPreprocessor.from_directory(tiny_bart_dir)
    preprocessor.tokenizer._backend.library.pre_tokenizer = pre_tokenizers.FixedLength(
        length=0
    )  # panics on any text but ""
    rows = preprocessor.try_encode_sources(["", "text", ""])
    assert [row.error for row in rows] == [None, RowErrorReason.TOKENIZER_FAILED, None]
    assert rows[0] == EncodedSource([0, 2], False, 2)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.none(), st.text(st.characters(), max_size=40), st.binary(max_size=20)), max_size=6))
def test_a_batch_equals_its_rows(preprocessor: Seq2SeqLMPreprocessor, texts: list[Any]) -> None:
    together = preprocessor.try_encode_sources(texts, 20)
    assert together == [preprocessor.try_encode_sources([text], 20)[0] for text in texts]
    for text, row in zip(texts, together, strict=True):
        if row.error is None and not row.truncated and "<" not in str(text):
            decoded = preprocessor.decode([row.token_ids])[0]
            assert decoded == (text.decode() if isinstance(text, bytes) else text)
