from collections import Counter
from typing import Any

import pytest
import torch
from transformers.generation import logits_process as theirs

from s2s_ray.errors import SettingsError
from s2s_ray.generation import samplers
from s2s_ray.generation.engine import Engine
from s2s_ray.generation.requests import Request
from s2s_ray.generation.samplers import Warpers
from s2s_ray.generation.settings import GenerationSettings
from tests.models.contract import load_ours, reference_model, settings_of, sources
from tests.models.test_bart import config

CONFIG = config(encoder_layers=1, vocab_size=61, init_std=0.15)
WARPERS: list[tuple[dict[str, Any], list[Any]]] = [
    ({"top_k": 5}, [theirs.TopKLogitsWarper(5)]),
    ({"top_p": 0.7}, [theirs.TopPLogitsWarper(0.7)]),
    ({"min_p": 0.2}, [theirs.MinPLogitsWarper(0.2)]),
    ({"typical_p": 0.6}, [theirs.TypicalLogitsWarper(0.6)]),
    (
        {"temperature": 0.6, "top_k": 30, "top_p": 0.9},
        [theirs.TemperatureLogitsWarper(0.6), theirs.TopKLogitsWarper(30), theirs.TopPLogitsWarper(0.9)],
    ),
    ({"top_p": 0.5, "min_p": 0.05}, [theirs.TopPLogitsWarper(0.5), theirs.MinPLogitsWarper(0.05)]),
]


@pytest.mark.parametrize(("settings", "processors"), WARPERS, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_filters_leave_transformers_distribution(settings: dict[str, Any], processors: list[Any]) -> None:
    logits = torch.randn(16, 61, generator=torch.Generator().manual_seed(0)) * 2
    expected = logits.clone()
    for processor in processors:
        expected = processor(torch.zeros(16, 1, dtype=torch.int64), expected)
    rows = [GenerationSettings(do_sample=True, **settings)] * 16
    scores, ids = Warpers(rows, torch.device("cpu")).filtered(logits)
    ours = torch.zeros_like(logits).scatter(1, ids, scores.softmax(dim=-1))
    torch.testing.assert_close(ours, expected.softmax(dim=-1))


def test_each_row_has_its_own_filters() -> None:
    logits = torch.randn(len(WARPERS), 61, generator=torch.Generator().manual_seed(1)) * 2
    together = Warpers([GenerationSettings(do_sample=True, **s) for s, _ in WARPERS], torch.device("cpu"))
    scores, ids = together.filtered(logits)
    mixed = torch.zeros_like(logits).scatter(1, ids, scores.softmax(dim=-1))
    for row, (settings, _) in enumerate(WARPERS):
        one = Warpers([GenerationSettings(do_sample=True, **settings)], torch.device("cpu"))
        scores, ids = one.filtered(logits[row : row + 1])
        alone = torch.zeros(1, 61).scatter(1, ids, scores.softmax(dim=-1))
        torch.testing.assert_close(mixed[row : row + 1], alone)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(load_ours(reference_model(CONFIG), tmp_path_factory.mktemp("bart")))


def draw(engine: Engine, row: list[int], count: int, **settings: Any) -> list[tuple[int, ...]]:
    chosen = settings_of(CONFIG, do_sample=True, eos_token_id=(), **settings)
    answers = engine.generate(Request(i, row, chosen) for i in range(count))
    return [tuple(a.sequences[0].token_ids) for a in sorted(answers, key=lambda a: a.request.row_id)]


@pytest.mark.parametrize("settings", [{}, {"top_k": 8}, {"top_p": 0.8, "temperature": 1.3}], ids=str)
def test_the_second_token_is_distributed_as_the_model_says(engine: Engine, settings: dict[str, Any]) -> None:
    row = sources(CONFIG, 1)[0]
    drawn = draw(engine, row, 4000, max_new_tokens=2, **settings)
    first = Counter(t[0] for t in drawn).most_common(1)[0][0]
    seen = Counter(t[1] for t in drawn if t[0] == first)
    batch = {
        "encoder_token_ids": torch.tensor([row]),
        "encoder_padding_mask": torch.ones(1, len(row), dtype=torch.bool),
        "decoder_token_ids": torch.tensor([[2, first]]),
    }
    with torch.no_grad():
        logits = engine.backbone(batch)[:, -1]
    scores, ids = Warpers([GenerationSettings(do_sample=True, **settings)], torch.device("cpu")).filtered(logits)
    expected = dict(zip(ids[0].tolist(), scores.softmax(dim=-1)[0].tolist(), strict=True))
    total = sum(seen.values())
    chi_square = sum((seen[t] - total * p) ** 2 / (total * p) for t, p in expected.items() if total * p >= 5)
    degrees = sum(total * p >= 5 for p in expected.values()) - 1
    assert total > 100 and degrees >= 2
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5  # four standard deviations, fixed seeds
    assert all(expected.get(t, 0) > 0 for t in seen)


def test_a_draw_depends_on_seed_and_row_id_alone(engine: Engine) -> None:
    row = sources(CONFIG, 1)[0]
    drawn = draw(engine, row, 50, max_new_tokens=6)
    assert len(set(drawn)) > 40
    settings = settings_of(CONFIG, do_sample=True, eos_token_id=(), max_new_tokens=6)
    crowd = [Request(900 + i, r, settings) for i, r in enumerate(sources(CONFIG, 40))]
    mixed = [crowd[0], Request(17, row, settings), *crowd[1:], Request(3, row, settings)]
    answers = {a.request.row_id: tuple(a.sequences[0].token_ids) for a in engine.generate(mixed)}
    assert answers[17] == drawn[17] and answers[3] == drawn[3]
    assert draw(engine, row, 5, max_new_tokens=6, seed=1) != drawn[:5]


def test_samples_of_a_row_differ(engine: Engine) -> None:
    settings = settings_of(CONFIG, do_sample=True, eos_token_id=(), max_new_tokens=6, num_return_sequences=8)
    answer = next(iter(engine.generate([Request(5, sources(CONFIG, 1)[0], settings)])))
    assert len({tuple(s.token_ids) for s in answer.sequences}) == 8


def test_kerashub_defaults() -> None:
    assert samplers.get("top_k").settings() == {
        "temperature": 1.0,
        "num_beams": 1,
        "do_sample": True,
        "top_k": 5,
        "top_p": 1.0,
        "penalty_alpha": 0.0,
    }
    assert samplers.get("top_p").get_config() == {"temperature": 1.0, "seed": None, "p": 0.1, "k": None}
    assert samplers.get("beam").settings()["num_beams"] == 5
    assert samplers.get({"class_name": "top_k", "config": {"k": 3}}).get_config()["k"] == 3
    assert samplers.get(samplers.GreedySampler).settings()["do_sample"] is False


@pytest.mark.parametrize("name", ["greedy", "random", "top_k", "top_p", "beam"])
def test_get_next_token_stands_alone(name: str) -> None:
    probabilities = torch.tensor([[0.05, 0.9, 0.05], [0.02, 0.03, 0.95]])
    tokens = samplers.get(name).get_next_token(probabilities)
    assert tokens.shape == (2,) and tokens.dtype == torch.int64
    if name not in ("random", "top_k"):
        assert tokens.tolist() == [1, 2]


@pytest.mark.parametrize(
    "bad", ["top-k", "Greedy", None, 3, {"class_name": "nope"}, {"class_name": "top_k", "config": {"q": 1}}]
)
def test_unknown_samplers_are_refused_with_the_list(bad: Any) -> None:
    with pytest.raises(SettingsError):
        samplers.get(bad)
    with pytest.raises(SettingsError, match="beam, contrastive, greedy, random, speculative, top_k, top_p"):
        samplers.get("nope")


@pytest.mark.parametrize(
    "make",
    [
        lambda: samplers.TopKSampler(k=-1),
        lambda: samplers.TopPSampler(p=0.0),
        lambda: samplers.BeamSampler(0),
        lambda: samplers.RandomSampler(0.0),
    ],
)
def test_values_out_of_range_are_refused(make: Any) -> None:
    with pytest.raises(SettingsError):
        make()
