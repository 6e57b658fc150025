"""The slot decoder gives what the cohort decoder gives: same rows, same settings, plain torch kernels."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BartConfig

from s2s_ray.generation import slots
from s2s_ray.generation.engine import Engine
from s2s_ray.generation.requests import Request
from tests.models.contract import load_ours, our_tokens, reference_model, run, settings_of, sources

CONFIG = BartConfig(
    vocab_size=211,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    max_position_embeddings=64,
    init_std=0.3,
)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_ours(reference_model(CONFIG, stop_bias=5.0), tmp_path_factory.mktemp("bart"))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"num_beams": 4}, id="beam"),
        pytest.param({"num_beams": 3, "early_stopping": True, "num_return_sequences": 3}, id="early"),
        pytest.param({"do_sample": True, "top_k": 7, "num_return_sequences": 2, "seed": 4}, id="sample"),
        pytest.param(
            {"num_beams": 2, "no_repeat_ngram_size": 2, "min_length": 9, "forced_bos_token_id": 5}, id="rules"
        ),
        pytest.param({"output_scores": True, "repetition_penalty": 1.3}, id="scores"),
        pytest.param({"num_beams": 2, "encoder_no_repeat_ngram_size": 2}, id="source-rules"),
    ],
)
def test_slots_give_what_cohorts_give(settings: dict[str, Any], backbone: Any) -> None:
    rows = sources(CONFIG, 30)
    chosen = settings_of(CONFIG, max_length=30, **settings)
    expected = run(Engine(backbone), rows, chosen)
    found = run(Engine(backbone, decoding="slots", max_slots=12), rows, chosen)
    for theirs, ours in zip(expected, found, strict=True):
        assert [s.token_ids for s in ours.sequences] == [s.token_ids for s in theirs.sequences]
        for one, other in zip(ours.sequences, theirs.sequences, strict=True):
            assert one.finish_reason == other.finish_reason
            assert one.score == pytest.approx(other.score, abs=1e-4) if other.score is not None else one.score is None


def test_rows_with_settings_of_their_own_share_the_slots(backbone: Any) -> None:
    rows = sources(CONFIG, 40)
    every = [
        settings_of(CONFIG, max_length=20),
        settings_of(CONFIG, max_length=12, no_repeat_ngram_size=2),
        settings_of(CONFIG, max_length=33, do_sample=True, seed=3),
        settings_of(CONFIG, max_length=20, num_beams=3),
    ]
    requests = [Request(i, row, every[i % 4], (7, 8) if i % 5 == 0 else (), i) for i, row in enumerate(rows)]
    expected, found = (
        {a.request.key: a.sequences[0].token_ids for a in engine.generate(requests)}
        for engine in (Engine(backbone), Engine(backbone, decoding="slots", max_slots=9))
    )
    assert found == expected


def test_weights_that_changed_are_used(tmp_path: Path) -> None:
    backbone = load_ours(reference_model(CONFIG, stop_bias=5.0), tmp_path / "one")
    engine = Engine(backbone, decoding="slots", max_slots=8)
    rows, settings = sources(CONFIG, 8), settings_of(CONFIG, max_length=20)
    before = our_tokens(engine, rows, settings)
    backbone.train()
    with torch.no_grad():
        for parameter in backbone.decoder_layers.parameters():
            parameter.mul_(-1.0)
    backbone.pack()
    after = our_tokens(engine, rows, settings)
    assert after != before
    assert after == our_tokens(Engine(backbone), rows, settings)


def test_a_row_larger_than_the_budget_runs_alone(backbone: Any) -> None:
    rows, settings = sources(CONFIG, 12), settings_of(CONFIG, max_length=20)
    small = Engine(backbone, decoding="slots", max_slots=8, max_batch_tokens=5)
    assert our_tokens(small, rows, settings) == our_tokens(Engine(backbone), rows, settings)


def test_a_limit_no_slot_has_room_for_is_an_error_row(backbone: Any) -> None:
    backbone = type(backbone)(backbone.config)
    type(backbone).max_target_length, kept = property(lambda self: None), type(backbone).max_target_length
    try:
        engine = Engine(backbone, decoding="slots", max_slots=8)
        (answer,) = engine.generate([Request(0, [0, 5, 2], settings_of(CONFIG))])
    finally:
        type(backbone).max_target_length = kept
    assert answer.error is not None and "max_length must be at most" in answer.message


@pytest.mark.parametrize("family", ["t5", "m2m_100", "marian"])
def test_every_kind_of_position_in_slots(family: str, tmp_path: Path) -> None:
    config = importlib.import_module(f"tests.models.test_{family}").config()
    model = reference_model(config)
    backbone = load_ours(model, tmp_path)
    rows = sources(config, 12)
    settings = settings_of(config, max_length=16, num_beams=3, no_repeat_ngram_size=2)
    found = our_tokens(Engine(backbone, decoding="slots", max_slots=9), rows, settings)
    assert found == our_tokens(Engine(backbone), rows, settings)


def test_a_family_without_a_source_limit_gets_tables_for_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tables for all of the device's memory took minutes to fill.
    monkeypatch.setattr(slots, "_SPAN", 16)
    config = importlib.import_module("tests.models.test_t5").config()
    backbone = load_ours(reference_model(config), tmp_path)
    rows, settings = sources(config, 12, longest=100), settings_of(config, max_length=8)
    assert len({(len(row) - 1).bit_length() for row in rows}) > 2
    engine = Engine(backbone, decoding="slots", max_slots=9, max_batch_tokens=2**30)
    assert our_tokens(engine, rows, settings) == our_tokens(Engine(backbone), rows, settings)
    assert engine._decoder._lane.arena.max_row_pages == 1
