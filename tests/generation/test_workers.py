"""Decoders in threads over the same weights: every row once, the same tokens, and the caller's threads as they were."""

import threading

import pytest
import torch

from s2s_ray.errors import RowErrorReason, SettingsError
from s2s_ray.generation.cohorts import CohortDecoder
from s2s_ray.generation.engine import Engine
from s2s_ray.generation.requests import Request
from s2s_ray.generation.workers import Workers, worker_count
from s2s_ray.kernels import cpu
from s2s_ray.models.backbone import Backbone
from tests.generation.test_engine import CONFIG, backbone, mixed_requests, tokens_by_key  # noqa: F401
from tests.models.contract import run, settings_of, sources

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no C compiler: one worker")


@pytest.fixture(autouse=True)
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_two_workers_give_every_row_once_and_leave_the_threads_alone(backbone: Backbone) -> None:  # noqa: F811
    requests = mixed_requests()
    engine = Engine(backbone, max_slots=32)
    assert isinstance(engine._decoder, Workers)
    answers = list(engine.generate(requests))
    assert len(answers) == len(requests)
    assert tokens_by_key(answers) == tokens_by_key(list(Engine(backbone, num_workers=1).generate(requests)))
    assert engine.stats.generated_tokens <= engine.stats.live_slot_steps <= engine.stats.slot_steps
    assert torch.get_num_threads() == 2
    fresh: list[int] = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert fresh == [2]


def test_both_take_part(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    seen = set()
    embed = backbone.embed_source

    def noted(*inputs: torch.Tensor) -> torch.Tensor:
        seen.add((threading.current_thread().name, torch.get_num_threads()))
        return embed(*inputs)

    monkeypatch.setattr(backbone, "embed_source", noted)
    run(Engine(backbone, max_slots=32), sources(CONFIG, 60), settings_of(CONFIG, max_length=8))
    assert len({name for name, threads in seen if threads == 1}) == 2
    seen.clear()
    run(Engine(backbone, max_slots=32), sources(CONFIG, 2), settings_of(CONFIG, max_length=8))
    assert [threads for _, threads in seen] == [2]  # one cohort: its worker has both threads


def test_what_one_worker_left_of_the_tokens_is_no_reason_to_decode_row_by_row(
    backbone: Backbone,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = []
    embed = backbone.embed_source

    def noted(token_ids: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
        sizes.append(len(token_ids))
        return embed(token_ids, padding_mask)

    monkeypatch.setattr(backbone, "embed_source", noted)
    engine = Engine(backbone, num_workers=2, max_batch_tokens=8 * 40 + 30)
    answers = run(engine, [[5] * 40 for _ in range(32)], settings_of(CONFIG, max_length=8))
    assert len(answers) == 32 and sizes == [8, 8, 8, 8]


def test_rows_that_have_become_few_go_on_together(
    backbone: Backbone,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = []
    take = CohortDecoder.take

    def noted(decoder: CohortDecoder, other: CohortDecoder) -> None:
        taken.append((decoder.used()[0], other.used()[0]))
        take(decoder, other)
        assert not other.busy

    monkeypatch.setattr(CohortDecoder, "take", noted)
    lengths = [6, 6, 20, 6, 14, 6, 6, 26]
    changes = [{"no_repeat_ngram_size": 2}, {"num_beams": 2}, {"do_sample": True, "seed": 3}]
    requests = [
        Request(i, source, settings_of(CONFIG, min_length=n, max_length=n + 1, **changes[i % 3]), key=i)
        for i, (source, n) in enumerate(zip(sources(CONFIG, 80), lengths * 10, strict=True))
    ]
    answers = list(Engine(backbone, num_workers=2).generate(requests))
    assert taken and all(0 < mine + others <= 32 for mine, others in taken)
    assert tokens_by_key(answers) == tokens_by_key(list(Engine(backbone, num_workers=1).generate(requests)))


def test_a_failure_of_a_worker_reaches_the_caller(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    rows, settings = sources(CONFIG, 40), settings_of(CONFIG, max_length=8)

    def scarce(*_: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    def broken(*_: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("broken")

    monkeypatch.setattr(backbone, "embed_source", scarce)
    assert {a.error for a in run(Engine(backbone), rows, settings)} == {RowErrorReason.OOM_SINGLE_ROW}
    monkeypatch.setattr(backbone, "embed_source", broken)
    with pytest.raises(ZeroDivisionError, match="broken"):
        list(Engine(backbone).generate(Request(i, row, settings) for i, row in enumerate(rows)))


def test_how_many_there_are(backbone: Backbone) -> None:  # noqa: F811
    assert [worker_count(None, slots) for slots in (None, 16, 31, 32, 64)] == [2, 1, 1, 2, 2]
    assert (worker_count(1, None), worker_count(8, None)) == (1, 2)
    with pytest.raises(SettingsError, match="num_workers"):
        Engine(backbone, num_workers=0)
