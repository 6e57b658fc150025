"""The loop itself: any order, any mix of settings, any batch gives a row the same answer."""

from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from s2s_ray.errors import RowErrorReason, SettingsError
from s2s_ray.generation.engine import Engine
from s2s_ray.generation.requests import Finished, Request
from s2s_ray.generation.samplers import Sampler
from s2s_ray.models.backbone import Backbone
from tests.models.contract import load_ours, our_tokens, reference_model, run, settings_of, sources
from tests.models.test_bart import config

CONFIG = config(encoder_layers=1, vocab_size=97)
MIXED: list[dict[str, Any]] = [
    {"max_length": 12},
    {"max_length": 25, "num_beams": 3, "early_stopping": True},
    {"max_length": 9, "do_sample": True, "top_k": 9, "seed": 3},
    {"max_length": 20, "no_repeat_ngram_size": 2},
    {"max_length": 14, "num_beams": 2, "num_return_sequences": 2, "repetition_penalty": 1.4},
    {"max_length": 18, "do_sample": True, "top_p": 0.8, "num_return_sequences": 3, "output_scores": True},
    {"max_length": 16, "num_beams": 3, "do_sample": True, "top_k": 20},
]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_ours(reference_model(CONFIG, stop_bias=5.0), tmp_path_factory.mktemp("bart"))


def mixed_requests() -> list[Request]:
    return [
        Request(1000 + i, row, settings_of(CONFIG, **MIXED[i % len(MIXED)]), (), i)
        for i, row in enumerate(sources(CONFIG, 35))
    ]


def tokens_by_key(answers: list[Finished]) -> dict[object, list[list[int]]]:
    return {answer.request.key: [s.token_ids for s in answer.sequences] for answer in answers}


def test_mixed_settings_in_any_batch_and_order_give_the_same_rows(backbone: Backbone) -> None:
    requests = mixed_requests()
    alone = {}
    for request in requests:
        alone |= tokens_by_key(list(Engine(backbone, max_slots=4).generate([request])))
    for slots, tokens, order in ((7, None, 1), (64, 300, -1), (1, 1, 1)):
        engine = Engine(backbone, max_slots=slots, max_batch_tokens=tokens)
        assert tokens_by_key(list(engine.generate(requests[::order]))) == alone


def test_rows_may_be_added_while_others_are_decoded(backbone: Backbone) -> None:
    requests = mixed_requests()
    engine = Engine(backbone, max_slots=10)
    answers: list[Finished] = []
    for start in range(0, len(requests), 5):
        engine.add(requests[start : start + 5])
        answers += engine.step() + engine.step()
    while engine.has_work:
        answers += engine.step()
    assert len(answers) == len(requests)
    assert tokens_by_key(answers) == tokens_by_key(list(Engine(backbone).generate(requests)))
    assert engine.stats.rows == len(requests)


def test_an_endless_input_is_answered_as_it_comes(backbone: Backbone) -> None:
    settings = settings_of(CONFIG, max_length=4)
    answers = Engine(backbone).generate(Request(i, [0, 5, 2], settings) for i in count())
    assert len({next(answers).request.row_id for _ in range(200)}) == 200


def test_freed_slots_are_refilled(backbone: Backbone) -> None:
    engine = Engine(backbone, max_slots=16)
    rows = sources(CONFIG, 150)
    run(engine, rows, settings_of(CONFIG, max_length=40))
    # Without refill 16 slots would wait for the longest of each batch: outputs here are 1 to 39 tokens long.
    assert engine.stats.live_slot_steps / engine.stats.slot_steps > 0.7


def test_no_rows() -> None:
    from s2s_ray.generation.scheduler import Budget, Scheduler

    assert Scheduler(Budget(slots=1, tokens=1, cohort_rows=1)).next_cohort(0, 0) is None


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_with_nonfinite_scores_are_error_rows_and_disturb_no_other(
    backbone: Backbone, beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sources(CONFIG, 20)
    settings = settings_of(CONFIG, max_length=12, num_beams=beams)
    expected = our_tokens(Engine(backbone), rows, settings)
    rows = [[*row[:-1], 96, 2] if i % 6 == 0 else [t if t != 96 else 95 for t in row] for i, row in enumerate(rows)]
    healthy = our_tokens(Engine(backbone), rows, settings)
    embed = backbone.embed_source

    def poisoned(token_ids: Tensor, padding_mask: Tensor) -> Tensor:
        marked = (token_ids == 96).any(dim=1)
        return embed(token_ids, padding_mask).masked_fill(marked[:, None, None], float("nan"))

    monkeypatch.setattr(backbone, "embed_source", poisoned)
    answers = run(Engine(backbone), rows, settings)
    bad = [i for i, answer in enumerate(answers) if answer.error is RowErrorReason.NONFINITE]
    assert bad == [0, 6, 12, 18]
    assert all([s.token_ids for s in answers[i].sequences] == healthy[i] for i in range(20) if i not in bad), (
        "a neighbour changed"
    )
    assert expected is not healthy


def test_out_of_memory_halves_the_cohort_and_names_the_row_that_never_fits(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [[t if t != 96 else 95 for t in row] for row in sources(CONFIG, 20)]
    rows[7] = [0, 96, 2]
    embed = backbone.embed_source
    sizes = []

    def small(token_ids: Tensor, padding_mask: Tensor) -> Tensor:
        sizes.append(len(token_ids))
        if len(token_ids) > 3 or (token_ids == 96).any():
            raise torch.OutOfMemoryError("out of memory")
        return embed(token_ids, padding_mask)

    monkeypatch.setattr(backbone, "embed_source", small)
    answers = run(Engine(backbone), rows, settings_of(CONFIG, max_length=8))
    assert max(sizes) > 3
    assert [i for i, a in enumerate(answers) if a.error is not None] == [7]
    assert answers[7].error is RowErrorReason.OOM_SINGLE_ROW


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_of_unlike_length_are_encoded_without_padding(
    backbone: Backbone, beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [[0, *range(5, 5 + 3 * i), 2] for i in range(1, 17)]
    settings = settings_of(CONFIG, max_length=12, num_beams=beams)
    alone = [run(Engine(backbone), [row], settings)[0].sequences[0].token_ids for row in rows]
    monkeypatch.setattr(backbone, "encode", None)  # what pads
    together = run(Engine(backbone), rows, settings)
    assert [answer.sequences[0].token_ids for answer in together] == alone


def test_rows_that_can_never_run_are_errors(backbone: Backbone) -> None:
    settings = settings_of(CONFIG, max_length=4)
    engine = Engine(backbone)
    too_long, no_room = engine.generate([Request(0, [5] * 65, settings), Request(1, [5], settings, (5, 6, 7))])
    assert too_long.error is RowErrorReason.TOO_LONG and "at most 64 tokens, has 65" in too_long.message
    assert no_room.error is RowErrorReason.TOO_LONG and "leaves no room below the limit of 4" in no_room.message


def test_finish_reasons(backbone: Backbone) -> None:
    answers = run(Engine(backbone), sources(CONFIG, 30), settings_of(CONFIG, max_length=20))
    for answer in answers:
        ids, reason = answer.sequences[0].token_ids, answer.sequences[0].finish_reason
        assert (reason == "stop") == (ids[-1] == 2) and (reason == "length") == (len(ids) == 19 and ids[-1] != 2)
    assert {a.sequences[0].finish_reason for a in answers} == {"stop", "length"}
    forced = run(Engine(backbone), sources(CONFIG, 30), settings_of(CONFIG, max_length=20, forced_eos_token_id=2))
    assert [a.sequences[0].finish_reason for a in forced] == [a.sequences[0].finish_reason for a in answers]


def test_the_family_limit_holds_where_nothing_else_does(backbone: Backbone) -> None:
    answer = run(Engine(backbone), [[0, 5, 2]], settings_of(CONFIG, eos_token_id=()))[0]
    assert len(answer.sequences[0].token_ids) == 63


def test_a_sampler_of_ones_own_decides(backbone: Backbone) -> None:
    class Second(Sampler):
        def get_next_token(self, probabilities: Tensor) -> Tensor:
            assert torch.allclose(probabilities.sum(dim=-1), torch.ones(len(probabilities)), atol=1e-4)
            return probabilities.topk(2, dim=-1).indices[:, 1]

    rows = sources(CONFIG, 5)
    first = our_tokens(Engine(backbone), rows, settings_of(CONFIG, max_length=2))
    second = our_tokens(Engine(backbone, sampler=Second()), rows, settings_of(CONFIG, max_length=2))
    assert all(a != b for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["max_batch_tokens", "max_slots"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "8"])
def test_sizes_are_checked(backbone: Backbone, name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=f"{name} must be a whole number of at least 1"):
        Engine(backbone, **{name: value})
