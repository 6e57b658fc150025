"""Steps: every row once an epoch, dealt alike to any number of workers; inputs in their proportions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2s_ray.errors import SettingsError
from s2s_ray.training.batches import Batch, BatchPlan, Examples, Mixture, Ragged, RaggedParts
from s2s_ray.training.steps import StepPlan, deal, worker_batches


def plan_of(rows: int, **options) -> BatchPlan:
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 30, rows), generator.integers(1, 9, rows)
    return BatchPlan(*lengths, batch_tokens=60, seed=1, **options)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 5))
def test_an_epoch_is_every_row_once_whatever_the_number_of_workers(rows, micro_batches, workers):
    steps = StepPlan(plan_of(rows), micro_batches, epochs=2)
    assert steps.total_steps == steps.ends[1]
    for epoch, (start, stop) in enumerate(zip([0, steps.ends[0]], steps.ends, strict=True)):
        seen = [row for step in range(start, stop) for batch in steps.rows(step) for row in batch]
        assert sorted(seen) == list(range(rows))
        assert {steps.epoch_of(step) for step in range(start, stop)} == {epoch}
    dealt = [deal(steps.rows(0), rank, workers) for rank in range(workers)]
    assert len({len(share) for share in dealt}) == 1
    places = [item[0] for share in dealt for item in share if item is not None]
    assert sorted(places) == list(range(len(steps.rows(0))))


def test_steps_end_at_max_steps_and_need_an_end():
    assert StepPlan(plan_of(50), 2, epochs=None, max_steps=40).total_steps == 40
    assert StepPlan(plan_of(50), 2, epochs=1, max_steps=3).total_steps == 3
    with pytest.raises(SettingsError, match="epochs or max_steps"):
        StepPlan(plan_of(50), 2, epochs=None)
    with pytest.raises(SettingsError, match="at least one pair"):
        StepPlan(plan_of(0), 2)


def test_workers_draw_dropout_by_the_place_in_the_step():
    rows = [[[4] * n, [5] * 2] for n in (3, 9, 5, 7, 2)]
    sources, labels = zip(*rows, strict=True)
    examples = Examples(Ragged.from_rows(sources), Ragged.from_rows(labels), 2, 1)
    plan = BatchPlan(examples.sources.lengths, examples.labels.lengths, batch_tokens=12, seed=4)
    steps = StepPlan(plan, 3)

    def seeds(rank: int, size: int) -> list[int]:
        return [b.seed for b in worker_batches(examples, steps, 0, rank, size) if b.target_weight]

    assert sorted(seeds(0, 1)) == sorted(seeds(0, 2) + seeds(1, 2)) and len(set(seeds(0, 1))) == len(seeds(0, 1))
    assert Batch.empty(1).target_weight == 0
    assert sum(b.target_weight for b in worker_batches(examples, steps, 0, 0, 1)) == steps.target_tokens(0) + sum(
        steps.target_tokens(step) for step in range(1, steps.total_steps)
    )


def test_inputs_are_seen_by_weight_and_their_rows_equally_often():
    mixture = Mixture((10, 90), (1.0, 1.0))
    assert mixture.counts() == [50, 50]
    rows = np.concatenate([mixture.rows(seed=2, epoch=epoch) for epoch in range(9)])
    counts = np.bincount(rows, minlength=100)
    assert set(counts[:10]) == {45} and set(counts[10:]) == {5}
    assert not np.array_equal(mixture.rows(2, 0), mixture.rows(2, 1))
    assert Mixture.tempered((10, 90), 1.0).counts() == [10, 90]
    assert Mixture.tempered((10, 90), 2.0).counts() == [25, 75]
    with pytest.raises(SettingsError, match="2 numbers above 0"):
        Mixture((10, 90), (1.0,))
    batches = plan_of(100, mixture=mixture).batches()
    assert sum((batch < 10).sum() for batch in batches) == 50


def test_parts_are_one_ragged():
    parts = [Ragged.from_rows(rows) for rows in ([[1], [2, 3]], [], [[4, 5, 6]])]
    joined, copied = RaggedParts(parts), Ragged.concatenate(parts)
    assert [joined[i].tolist() for i in range(3)] == [copied[i].tolist() for i in range(3)]
    assert np.array_equal(joined.pad([2, 0], 4, 9), copied.pad([2, 0], 4, 9))
