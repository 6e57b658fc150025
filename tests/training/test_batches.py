"""Every row once an epoch, within the token budget, the same for the same seed; padding as the preprocessor's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.bart.modeling_bart import shift_tokens_right

from s2s_ray.errors import InputError, SettingsError
from s2s_ray.training.batches import Batch, BatchPlan, Examples, Ragged

lengths = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=150)


def plan_of(rows, **options) -> BatchPlan:
    sources, targets = np.array(rows, dtype=np.int64).T
    return BatchPlan(sources, targets, **options)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(20, 400), st.sampled_from([1, 8]), st.integers(0, 5))
def test_token_batches_hold_every_row_once_within_the_budget(rows, budget, multiple, epoch):
    plan = plan_of(rows, batch_tokens=budget, multiple=multiple, window_batches=3, epoch=epoch)
    batches = plan.batches()
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(rows)))
    for batch in batches:
        widths = [-(-int(side[batch].max()) // multiple) * multiple for side in (plan.sources, plan.targets)]
        assert len(batch) == 1 or len(batch) * sum(widths) <= budget


def test_batches_follow_seed_and_epoch():
    rows = [(i % 37 + 1, 3) for i in range(200)]
    first = plan_of(rows, batch_tokens=100, seed=1).batches()
    assert all(
        np.array_equal(a, b) for a, b in zip(first, plan_of(rows, batch_tokens=100, seed=1).batches(), strict=True)
    )
    for other in (plan_of(rows, batch_tokens=100, seed=2), plan_of(rows, batch_tokens=100, seed=1, epoch=1)):
        assert not np.array_equal(first[0], other.batches()[0])


def test_sorting_saves_padding_of_both_sides():
    generator = np.random.default_rng(0)
    drawn = (generator.lognormal(mean, 0.6, 20_000).clip(1, most) for mean, most in ((4.2, 512), (2.4, 64)))
    sources, targets = (side.astype(np.int64) for side in drawn)

    def share(**options) -> float:
        batches = BatchPlan(sources, targets, **options).batches()
        padded = sum(len(b) * (int(sources[b].max()) + int(targets[b].max())) for b in batches)
        return 1 - float(sources.sum() + targets.sum()) / padded

    assert share(batch_tokens=4096) < 0.1
    assert share(batch_size=50) > 0.5


def test_an_interrupted_epoch_goes_on_where_it_stopped():
    rows = [(i % 11 + 1, 2) for i in range(60)]
    whole = plan_of(rows, batch_tokens=64, seed=3)
    expected = [list(batch) for batch in [*whole, *whole]]
    broken = plan_of(rows, batch_tokens=64, seed=3)
    seen = [list(batch) for _, batch in zip(range(4), broken, strict=False)]
    state = broken.state_dict()
    resumed = plan_of(rows, batch_tokens=64, seed=3)
    resumed.load_state_dict(state)
    seen = seen[: state["position"]] + [list(batch) for batch in [*resumed, *resumed]]
    assert seen == expected
    with pytest.raises(SettingsError, match="seed 3"):
        plan_of(rows, seed=4).load_state_dict(state)


def test_batch_size_without_shuffling_keeps_the_order():
    batches = plan_of([(1, 1)] * 10, batch_size=4, shuffle=False).batches()
    assert [b.tolist() for b in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    with pytest.raises(SettingsError, match="batch_size"):
        plan_of([(1, 1)], batch_size=0)


def test_collate_equals_the_preprocessor_and_transformers(task, pairs):
    x, y, weight = task.preprocessor(pairs)
    sources, _ = task.preprocessor.encode_sources(pairs["encoder_text"])
    labels = Ragged.from_rows(task.preprocessor.encode_targets(pairs["decoder_text"]))
    examples = Examples(Ragged.from_rows(sources), labels, task.preprocessor.decoder_start_token_id, 1)
    ours, theirs = examples.collate(range(len(sources))), Batch.from_arrays(x, y, weight)
    for name in ("encoder_token_ids", "encoder_padding_mask", "decoder_token_ids"):
        assert torch.equal(ours.inputs[name], theirs.inputs[name]), name
    assert torch.equal(ours.labels, theirs.labels)
    assert torch.equal(ours.weights, theirs.weights)
    assert ours.target_weight == theirs.target_weight
    assert torch.equal(ours.inputs["decoder_token_ids"], shift_tokens_right(ours.labels, 1, 2))


def test_preprocessed_input_is_checked():
    ids = np.ones((2, 3), int)
    with pytest.raises(InputError, match="decoder_token_ids"):
        Batch.from_arrays({"encoder_token_ids": ids}, ids)
    with pytest.raises(InputError, match="one shape"):
        Batch.from_arrays({"encoder_token_ids": ids, "decoder_token_ids": ids}, ids[:, :2])
    rows = Batch.from_arrays({"encoder_token_ids": ids, "decoder_token_ids": ids}, ids, np.array([2.0, 0.5]))
    assert rows.weights.tolist() == [[2.0] * 3, [0.5] * 3]
