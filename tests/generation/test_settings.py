"""GenerationSettings: every check, both directions of generation_config.json, and the length a row may reach."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2s_ray.errors import SettingsError
from s2s_ray.generation.settings import FIELD_NAMES, GenerationSettings

NAN, INF = float("nan"), float("inf")
AT_LEAST_ONE = ("num_beams", "num_return_sequences", "max_length", "max_new_tokens")
AT_LEAST_ZERO = ("min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size")
BAD: list[tuple[str, Any]] = [
    *((name, value) for name in AT_LEAST_ONE for value in (0, -1, 1.5, "3", True)),
    *((name, value) for name in AT_LEAST_ZERO for value in (-1, 0.5, "3", True, None)),
    *(
        (name, value)
        for name in ("temperature", "repetition_penalty")
        for value in (0, -0.1, INF, NAN, "1", True, None)
    ),
    *((name, value) for name in ("top_p", "typical_p") for value in (0, -0.1, 1.01, NAN, "0.5", True, None)),
    *(("min_p", value) for value in (-0.1, 1.1, NAN, "0", True, None)),
    *(("length_penalty", value) for value in (INF, -INF, NAN, "1", True, None)),
    *(("early_stopping", value) for value in ("always", "", None, 2)),
    *(("seed", value) for value in (2**63, -(2**63), 1.0, "1", True, None)),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_value_out_of_range_is_refused(name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=rf"^{name} must be .* Received: ") as raised:
        GenerationSettings(**{name: value, "num_beams": 2} if name != "num_beams" else {name: value})
    assert repr(value) in str(raised.value)


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_numbers_of_sequences_are_not_optional(name: str, do_sample: bool) -> None:
    with pytest.raises(SettingsError, match=rf"^{name} must be .* Received: None"):
        GenerationSettings(**{name: None, "do_sample": do_sample})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in AT_LEAST_ONE[2:] for value in (None, 1, 10**6)),
        ("num_beams", 1),
        ("num_beams", 200),
        *((name, value) for name in AT_LEAST_ZERO for value in (0, 10**6)),
        *((name, value) for name in ("temperature", "repetition_penalty") for value in (1e-6, 1, 100.0)),
        *((name, value) for name in ("top_p", "typical_p") for value in (1e-6, 1, 1.0)),
        *(("min_p", value) for value in (0, 0.5, 1)),
        *(("length_penalty", value) for value in (-2.0, 0, 3)),
        *(("early_stopping", value) for value in (True, False, "never")),
        *(("seed", value) for value in (2**63 - 1, -(2**63) + 1, 0)),
    ],
)
def test_the_edges_of_each_range_are_allowed(name: str, value: Any) -> None:
    assert getattr(GenerationSettings(**{name: value}), name) == value


def test_more_sequences_than_beams_need_sampling() -> None:
    with pytest.raises(SettingsError, match="num_return_sequences must be at most num_beams"):
        GenerationSettings(num_return_sequences=2)
    assert GenerationSettings(num_return_sequences=2, num_beams=2).num_return_sequences == 2
    assert GenerationSettings(num_return_sequences=9, do_sample=True).num_return_sequences == 9


def test_beams_that_sample_return_at_most_their_own_number() -> None:
    """A row of beam search has `num_beams` hypotheses and no more, sampled or not."""
    with pytest.raises(SettingsError, match="num_return_sequences must be at most num_beams"):
        GenerationSettings(num_return_sequences=4, num_beams=3, do_sample=True)


@pytest.mark.parametrize("value", [-1, 1.5, "2", True])
@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("decoder_start_token_id", lambda i: i),
        ("pad_token_id", lambda i: i),
        ("forced_bos_token_id", lambda i: i),
        ("forced_eos_token_id", lambda i: i),
        ("eos_token_id", lambda i: i),
        ("eos_token_id", lambda i: [2, i]),
        ("suppress_tokens", lambda i: [i]),
        ("begin_suppress_tokens", lambda i: [5, i]),
        ("bad_words_ids", lambda i: [[5, i]]),
    ],
)
def test_token_ids_are_whole_numbers_from_0(name: str, wrap: Callable[[Any], Any], value: Any) -> None:
    """They come from a preset's files, and index the vocabulary."""
    with pytest.raises(SettingsError, match=f"^{name} must "):
        GenerationSettings(**{name: wrap(value)})


@pytest.mark.parametrize("value", [0, 1])
def test_early_stopping_is_no_number(value: int) -> None:
    """1 == True, but the search asks `is True`."""
    with pytest.raises(SettingsError, match=r"^early_stopping must "):
        GenerationSettings(early_stopping=value)  # type: ignore[arg-type]


def test_settings_are_frozen_hashable_and_compare_by_value() -> None:
    one = GenerationSettings(bad_words_ids=[[1, 2], [3]], suppress_tokens=[4], eos_token_id=2)  # type: ignore[arg-type]
    two = GenerationSettings(bad_words_ids=((1, 2), (3,)), suppress_tokens=(4,), eos_token_id=(2,))
    assert one == two
    assert hash(one) == hash(two)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.num_beams = 2  # type: ignore[misc]


@pytest.mark.parametrize(("given", "stored"), [(2, (2,)), ([2, 3], (2, 3)), (None, ()), ((), ())])
def test_stop_tokens_take_any_usual_form(given: Any, stored: tuple[int, ...]) -> None:
    assert GenerationSettings(eos_token_id=given).eos_token_id == stored


def test_replace_checks_names_and_values() -> None:
    settings = GenerationSettings(num_beams=4)
    assert settings.replace(length_penalty=2.0) == GenerationSettings(num_beams=4, length_penalty=2.0)
    with pytest.raises(SettingsError, match=r"unknown generation setting 'num_beam'; known: .*num_beams"):
        settings.replace(num_beam=2)
    with pytest.raises(SettingsError, match="num_beams must be"):
        settings.replace(num_beams=0)


@pytest.mark.parametrize(
    ("settings", "prompt", "family", "limit"),
    [
        ({"max_length": 20}, 1, 1024, 20),
        ({"max_length": 20}, 7, 1024, 20),  # start token and prompt count
        ({"max_length": 20, "max_new_tokens": 5}, 7, 1024, 12),  # max_new_tokens wins
        ({"max_new_tokens": 5}, 1, None, 6),
        ({"max_length": 2000}, 1, 1024, 1024),  # never beyond the positions there are
        ({"max_new_tokens": 2000}, 9, 1024, 1024),
        ({}, 1, 1024, 1024),  # no silent 20
        ({}, 1, None, 2**31),
    ],
)
def test_length_limit(settings: dict[str, int], prompt: int, family: int | None, limit: int) -> None:
    assert GenerationSettings(**settings).length_limit(prompt, family) == limit  # type: ignore[arg-type]


def test_from_configs_merges_and_later_ones_win() -> None:
    config = {"num_beams": 4, "max_length": 62, "d_model": 1024, "eos_token_id": 2, "decoder_start_token_id": 2}
    generation_config = {"num_beams": 6, "max_length": None, "transformers_version": "4.27.0", "forced_bos_token_id": 0}
    settings = GenerationSettings.from_configs(config, generation_config)
    assert (settings.num_beams, settings.max_length, settings.forced_bos_token_id) == (6, 62, 0)
    assert (settings.eos_token_id, settings.decoder_start_token_id) == ((2,), 2)


def test_from_configs_starts_with_bos_where_no_start_token_is_named() -> None:
    assert GenerationSettings.from_configs({"bos_token_id": 5}).decoder_start_token_id == 5
    assert GenerationSettings.from_configs({"bos_token_id": 5}, {"bos_token_id": 6}).decoder_start_token_id == 6
    named = {"bos_token_id": 5, "decoder_start_token_id": 0}
    assert GenerationSettings.from_configs(named).decoder_start_token_id == 0
    assert GenerationSettings.from_configs({}).decoder_start_token_id == 0


def test_from_configs_samples_with_top_k_50_as_transformers_does() -> None:
    assert GenerationSettings.from_configs({"do_sample": True}).top_k == 50
    assert GenerationSettings.from_configs({"do_sample": True, "top_k": 0}).top_k == 0
    assert GenerationSettings.from_configs({}).top_k == 0


def test_from_configs_refuses_what_the_constructor_refuses() -> None:
    with pytest.raises(SettingsError, match="num_beams must be"):
        GenerationSettings.from_configs({"num_beams": "four"})


IDS = st.integers(0, 50_000)
SETTINGS = st.builds(
    GenerationSettings,
    max_length=st.none() | st.integers(1, 5000),
    max_new_tokens=st.none() | st.integers(1, 5000),
    min_length=st.integers(0, 100),
    num_beams=st.integers(1, 8),
    do_sample=st.just(False),
    length_penalty=st.floats(-2, 3),
    early_stopping=st.sampled_from([True, False, "never"]),
    repetition_penalty=st.floats(0.5, 2),
    no_repeat_ngram_size=st.integers(0, 5),
    bad_words_ids=st.lists(st.lists(IDS, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple),
    suppress_tokens=st.lists(IDS, max_size=3).map(tuple),
    forced_bos_token_id=st.none() | IDS,
    forced_eos_token_id=st.none() | IDS,
    decoder_start_token_id=IDS,
    pad_token_id=IDS,
    eos_token_id=st.lists(IDS, max_size=3, unique=True).map(tuple),
)


@given(SETTINGS)
def test_to_config_and_back_through_json(settings: GenerationSettings) -> None:
    assert GenerationSettings.from_configs(json.loads(json.dumps(settings.to_config()))) == settings


def test_to_config_has_what_transformers_reads_and_nothing_of_a_single_call() -> None:
    config = GenerationSettings(num_beams=4, eos_token_id=(2,), seed=9, output_scores=True).to_config()
    assert config == {"num_beams": 4, "eos_token_id": 2, "decoder_start_token_id": 0, "pad_token_id": 0}


def test_transformers_reads_to_config_with_the_same_meaning() -> None:
    from transformers import GenerationConfig

    settings = GenerationSettings(
        num_beams=4, length_penalty=2.0, no_repeat_ngram_size=3, min_length=5, max_length=60, eos_token_id=(2, 3)
    )
    theirs = GenerationConfig.from_dict(settings.to_config())
    for name in FIELD_NAMES - {"seed", "eos_token_id"}:
        ours, value = getattr(settings, name), getattr(theirs, name, None)
        if ours != GenerationSettings.__dataclass_fields__[name].default:
            assert value == ours, name
    assert theirs.eos_token_id == [2, 3]
