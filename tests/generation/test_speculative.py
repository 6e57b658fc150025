"""Speculative decoding gives greedy search's tokens, whatever guesses, under every rule."""

from typing import Any

import pytest
import torch
from transformers import T5Config

from s2s_ray.errors import SettingsError
from s2s_ray.generation.drafts import SourceDraft
from s2s_ray.generation.engine import Engine
from s2s_ray.generation.requests import Request
from s2s_ray.generation.speculative import Speculation
from s2s_ray.models.backbone import Backbone
from tests.models import test_bart
from tests.models.contract import load_ours, reference_model, settings_of, sources

BART = test_bart.config(encoder_layers=1, vocab_size=97)
T5 = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
LIMIT = 30
RULES: list[dict[str, Any]] = [
    {},
    {"no_repeat_ngram_size": 2, "output_scores": True},
    {"min_length": 9, "repetition_penalty": 1.3},
    {"forced_bos_token_id": 7, "forced_eos_token_id": 2, "max_length": 11},
    {"bad_words_ids": [[5], [7, 9]], "encoder_no_repeat_ngram_size": 2},
    {"max_new_tokens": 1},
]


@pytest.fixture(scope="module", params=[BART, T5], ids=["bart", "t5"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Backbone, Backbone]:
    """The config, the model, and a draft model: the same one with some noise, so that it is right at times."""
    folder = tmp_path_factory.mktemp("presets")
    model = reference_model(request.param, stop_bias=3.0)
    ours = load_ours(model, folder / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return request.param, ours, load_ours(model, folder / "draft")


def requests_of(config: Any) -> list[Request]:
    rows = sources(config, 3 * len(RULES))
    settings = [settings_of(config, **({"max_length": LIMIT} | rules)) for rules in RULES]
    prompts = [[9, 11, 12, 13, 14, 15, 16, 17][: 4 * (i % 3)] for i in range(len(rows))]
    return [
        Request(i, row, settings[i % len(RULES)], () if "forced_bos_token_id" in RULES[i % len(RULES)] else prompt, i)
        for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True))
    ]


def answers(engine: Engine, requests: list[Request]) -> list[tuple[list[int], str, Any]]:
    found = sorted(engine.generate(requests), key=lambda answer: answer.request.row_id)
    assert not [answer.message for answer in found if answer.error]
    return [(a.sequences[0].token_ids, a.sequences[0].finish_reason, a.sequences[0].score) for a in found]


@pytest.mark.parametrize("count,with_draft,slots", [(5, False, 64), (1, False, 3), (4, True, 64), (2, True, 5)])
def test_tokens_are_those_of_greedy_search(
    models: tuple[Any, Backbone, Backbone], count: int, with_draft: bool, slots: int
) -> None:
    config, backbone, draft = models
    requests = requests_of(config)
    greedy = answers(Engine(backbone), requests)
    engine = Engine(backbone, max_slots=slots, speculation=Speculation(count, draft if with_draft else None))
    for (ids, reason, score), expected in zip(answers(engine, requests), greedy, strict=True):
        assert (ids, reason) == expected[:2]
        assert score == (None if expected[2] is None else pytest.approx(expected[2], abs=1e-3))
    assert engine.stats.generated_tokens == sum(len(ids) for ids, _, _ in greedy)


def test_right_guesses_save_steps(models: tuple[Any, Backbone, Backbone]) -> None:
    config, backbone, _ = models
    requests = [Request(0, sources(config, 1)[0], settings_of(config, max_length=LIMIT, eos_token_id=()), (), 0)]
    engine = Engine(backbone, speculation=Speculation(4, backbone))  # a draft model that is always right
    ((ids, _, _),) = answers(engine, requests)
    assert len(ids) == LIMIT - 1 and engine.stats.steps == -(-(LIMIT - 1) // 5)


def test_the_source_is_searched_for_the_longest_ngram_first() -> None:
    settings = settings_of(BART)
    source = [0, 5, 6, 7, 8, 9, 6, 7, 20, 21, 2]
    draft = SourceDraft([Request(0, source, settings, prompt_ids=[40, 41])], 3)
    assert draft.propose([[2]]) == [[40, 41]]
    assert draft.propose([[2, 40, 41]]) == [[]]
    assert draft.propose([[2, 40, 41, 7]]) == [[8, 9, 6]]
    assert draft.propose([[2, 9, 6, 7]]) == [[20, 21, 2]]
    draft.keep([])
    assert draft.propose([]) == []


def test_what_cannot_be_speculated_is_refused(models: tuple[Any, Backbone, Backbone]) -> None:
    config, backbone, _ = models
    engine = Engine(backbone, speculation=Speculation())
    for changes in ({"num_beams": 2}, {"do_sample": True}, {"top_k": 4, "penalty_alpha": 0.5}):
        with pytest.raises(SettingsError, match=r"must be .* for speculative decoding"):
            engine.add([Request(0, [5, 2], settings_of(config, max_length=9, **changes))])
    with pytest.raises(SettingsError, match="whole number of at least 1"):
        Speculation(0)
    config = type(config)(**(config.to_dict() | {"vocab_size": 50}))
    small = type(backbone)(config.to_dict())
    with pytest.raises(SettingsError, match="vocabulary of the model"):
        Engine(backbone, speculation=Speculation(draft=small))
