"""Every generation setting, greedy and in beams, against transformers: equal tokens, equal scores."""

from typing import Any

import pytest
import torch

from s2s_ray.generation.engine import Engine
from tests.models.contract import (
    load_ours,
    our_tokens,
    padded,
    reference_model,
    reference_tokens,
    run,
    settings_of,
    sources,
)
from tests.models.test_bart import config

CONFIG = config(encoder_layers=1, vocab_size=97)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Engine]:
    model = reference_model(CONFIG, stop_bias=4.0)
    return model, Engine(load_ours(model, tmp_path_factory.mktemp("bart")), max_slots=24)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"min_length": 9},
    {"min_new_tokens": 7},
    {"max_new_tokens": 5},
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"bad_words_ids": [[5], [7, 9], [2], [20, 21, 22]]},
    {"suppress_tokens": [5, 6, 9], "begin_suppress_tokens": [11, 12]},
    {"begin_suppress_tokens": list(range(3, 60)), "forced_bos_token_id": 0},
    {"forced_bos_token_id": 7, "forced_eos_token_id": 2},
    {"eos_token_id": [2, 17, 33]},
]
BEAMS: list[dict[str, Any]] = [
    {"num_beams": 2},
    {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
    {"num_beams": 3, "length_penalty": 0.3, "early_stopping": "never"},
    {"num_beams": 3, "length_penalty": -1.0},
    {"num_beams": 3, "length_penalty": 0.0, "early_stopping": "never"},
    {"num_beams": 4, "num_return_sequences": 4, "early_stopping": "never", "length_penalty": 1.3},
]


@pytest.mark.parametrize(
    "beams", [{}, {"num_beams": 3}, {"num_beams": 4, "early_stopping": True}], ids=["greedy", "3", "4"]
)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s) or "plain")
def test_constraints(pair: tuple[Any, Engine], settings: dict[str, Any], beams: dict[str, Any]) -> None:
    model, engine = pair
    rows = sources(CONFIG, 8)
    given = {"max_length": 20} | settings | beams
    assert our_tokens(engine, rows, settings_of(CONFIG, **given)) == reference_tokens(model, rows, **given)


@pytest.mark.parametrize("settings", BEAMS, ids=str)
def test_beam_search_and_its_scores(pair: tuple[Any, Engine], settings: dict[str, Any]) -> None:
    model, engine = pair
    rows = sources(CONFIG, 8, seed=5)
    given = {"max_length": 22} | settings
    answers = run(engine, rows, settings_of(CONFIG, **given))
    ids, mask = padded(rows, CONFIG.pad_token_id)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        return_dict_in_generate=True,
        output_scores=True,
        forced_eos_token_id=None,
        **given,
    )
    assert [[s.token_ids for s in a.sequences] for a in answers] == reference_tokens(model, rows, **given)
    scores = torch.tensor([s.score for a in answers for s in a.sequences])
    torch.testing.assert_close(scores, output.sequences_scores, rtol=1e-4, atol=1e-4)


def test_n_gram_ban_against_the_source(pair: tuple[Any, Engine]) -> None:
    # One by one: in a padded batch transformers would take the padding for n-grams of the source.
    model, engine = pair
    for size in (1, 2):
        given = {"max_length": 20, "encoder_no_repeat_ngram_size": size}
        rows = sources(CONFIG, 6)
        ours = our_tokens(engine, rows, settings_of(CONFIG, **given))
        assert ours == [reference_tokens(model, [row], **given)[0] for row in rows]


def test_decoder_prompts(pair: tuple[Any, Engine]) -> None:
    from s2s_ray.generation.requests import Request

    model, engine = pair
    rows = sources(CONFIG, 6)
    prompts = [[11, 12, 13][: 1 + i % 3] for i in range(6)]
    for beams in (1, 3):
        given = {"max_length": 18, "num_beams": beams, "min_new_tokens": 3, "no_repeat_ngram_size": 2}
        settings = settings_of(CONFIG, **given)
        answers = sorted(
            engine.generate(Request(i, r, settings, p, i) for i, (r, p) in enumerate(zip(rows, prompts, strict=True))),
            key=lambda answer: answer.request.row_id,
        )
        for answer, row, prompt in zip(answers, rows, prompts, strict=True):
            start = torch.tensor([[CONFIG.decoder_start_token_id, *prompt]])
            theirs = model.generate(
                input_ids=torch.tensor([row]),
                decoder_input_ids=start,
                do_sample=False,
                forced_eos_token_id=None,
                **given,
            )[0].tolist()[1 + len(prompt) :]
            assert answer.sequences[0].token_ids == theirs


def test_greedy_scores_are_the_sum_of_log_probabilities(pair: tuple[Any, Engine]) -> None:
    model, engine = pair
    rows = sources(CONFIG, 6)
    answers = run(engine, rows, settings_of(CONFIG, max_length=15, output_scores=True, no_repeat_ngram_size=2))
    for answer, row in zip(answers, rows, strict=True):
        tokens = answer.sequences[0].token_ids
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([row]),
                decoder_input_ids=torch.tensor([[CONFIG.decoder_start_token_id, *tokens[:-1]]]),
            ).logits[0]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).sum().item()
        assert answer.sequences[0].score == pytest.approx(expected, abs=1e-3)
    assert run(engine, rows[:1], settings_of(CONFIG, max_length=5))[0].sequences[0].score is None
