"""One step against transformers' loss and gradients; micro-batches and workers against one big batch."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import BartForConditionalGeneration

from s2s_ray import Seq2SeqLM
from s2s_ray.errors import SettingsError
from s2s_ray.training.batches import Batch, Examples, Ragged
from s2s_ray.training.distributed import compile_layers
from s2s_ray.training.loss import CrossEntropy
from s2s_ray.training.step import NonFiniteLossError, Totals, TrainStep


@pytest.fixture
def examples(task, pairs) -> Examples:
    sources, _ = task.preprocessor.encode_sources(pairs["encoder_text"])
    labels = task.preprocessor.encode_targets(pairs["decoder_text"])
    return Examples(Ragged.from_rows(sources), Ragged.from_rows(labels), 2, 1)


def sgd_step(task: Seq2SeqLM, **options) -> TrainStep:
    task.backbone.eval()  # no dropout, so that runs can be compared
    return TrainStep(task.backbone, torch.optim.SGD(task.backbone.parameters(), lr=1.0), **options)


def trained(task: Seq2SeqLM, batches: list[Batch], divisor=None, **options) -> tuple[float, dict[str, torch.Tensor]]:
    totals = Totals()
    sgd_step(task, **options)(batches, totals, divisor)
    return totals.results()["loss"], {k: v.detach().clone() for k, v in task.backbone.state_dict().items()}


def test_loss_and_gradients_equal_transformers(task, examples, tiny_bart_dir):
    batch = examples.collate(range(16))
    model = BartForConditionalGeneration.from_pretrained(tiny_bart_dir).eval()
    before = {name: p.detach().clone() for name, p in task.backbone.named_parameters()}
    loss, after = trained(task, [batch])
    output = model(
        input_ids=batch.inputs["encoder_token_ids"],
        attention_mask=batch.inputs["encoder_padding_mask"],
        labels=batch.labels.masked_fill(batch.weights == 0, -100),
    )
    output.loss.backward()
    assert loss == pytest.approx(output.loss.item(), rel=1e-6)
    theirs = dict(model.named_parameters())
    assert len(before) == len(theirs)
    for name, weight in before.items():
        gradient = theirs[task.backbone.checkpoint_name(name)].grad
        torch.testing.assert_close(weight - after[name], gradient, atol=2e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_without_padding_have_the_loss_and_gradients_of_padded_ones(tiny_bart_dir, examples, precision):
    batch = examples.collate(range(16), 8)
    packed = batch.packed()
    assert packed.labels.shape == (int(batch.weights.sum()),) and len(packed) == len(batch) == 16
    assert packed.padded_targets == batch.padded_targets == batch.labels.numel()
    loss, weights = trained(Seq2SeqLM.from_preset(tiny_bart_dir), [batch], precision=precision)
    other, moved = trained(Seq2SeqLM.from_preset(tiny_bart_dir), [packed], precision=precision)
    exact = precision == "fp32"
    assert other == pytest.approx(loss, rel=1e-6 if exact else 2e-3)
    for name, weight in weights.items():
        tolerance = {"atol": 2e-6, "rtol": 1e-5} if exact else {"atol": 2e-2, "rtol": 0.1}
        torch.testing.assert_close(moved[name], weight, **tolerance, msg=name)


def test_compiled_layers_are_one_program_for_all_shapes(tiny_bart_dir, examples):
    def losses(compiled: bool) -> list[float]:
        task = Seq2SeqLM.from_preset(tiny_bart_dir)
        if compiled:  # as the code generator is given it, without running the generator
            compile_layers(task.backbone, backend="eager")
        step = sgd_step(task)
        totals = [Totals() for _ in range(4)]
        for number, each in enumerate(totals):
            step([examples.collate(range(5 * number, 7 * number + 5), 8).packed()], each)
        return [each.results()["loss"] for each in totals]

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert losses(compiled=True) == pytest.approx(losses(compiled=False), rel=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_compiled_layers_are_not_cut_up_for_several_workers(tiny_bart_dir, examples, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    torch._dynamo.reset()
    task, programs = Seq2SeqLM.from_preset(tiny_bart_dir), []
    compile_layers(task.backbone, backend=lambda program, inputs: programs.append(program) or program.forward)
    try:
        model = DistributedDataParallel(task.backbone, bucket_cap_mb=0.01)  # less than a layer
        batch = examples.collate(range(8)).packed()
        TrainStep(model, torch.optim.SGD(task.backbone.parameters(), lr=0.1))([batch], Totals())
    finally:
        torch.distributed.destroy_process_group()
    assert len(programs) == 2


def test_what_is_packed_follows_masks_and_weights(examples):
    batch = examples.collate(range(4))
    hole, weights = batch.inputs["encoder_padding_mask"].clone(), batch.weights.clone()
    hole[0, 1] = False  # padding between tokens
    kept = replace(batch, inputs=batch.inputs | {"encoder_padding_mask": hole})
    assert kept.packed() is kept
    weights[1] = 0  # a row of the batch that is not to count keeps one token
    assert (batch.packed().labels == batch.labels[batch.weights > 0]).all()
    assert len(replace(batch, weights=weights).packed().labels) == weights.sum() + 1
    assert len(replace(batch, weights=torch.ones_like(weights)).packed().labels) == weights.numel()


@pytest.mark.parametrize("reduction", ["tokens", "keras"])
def test_micro_batches_make_one_big_batch(tiny_bart_dir, examples, reduction):
    parts = [range(5), range(5, 6), range(6, 16)]
    width = 32  # one width, as the Keras reduction counts padding
    whole = Examples(examples.sources, examples.labels, 2, 1, widths=(128, width))
    loss = CrossEntropy(reduction=reduction, label_smoothing=0.1)
    one, weights = trained(Seq2SeqLM.from_preset(tiny_bart_dir), [whole.collate(range(16))], loss=loss)
    many, other = trained(Seq2SeqLM.from_preset(tiny_bart_dir), [whole.collate(rows) for rows in parts], loss=loss)
    assert many == pytest.approx(one, rel=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(other[name], weight, atol=1e-6, rtol=1e-5, msg=name)


def test_workers_that_average_gradients_make_one_big_batch(tiny_bart_dir, examples):
    _, expected = trained(Seq2SeqLM.from_preset(tiny_bart_dir), [examples.collate(range(16))])
    shards = [examples.collate(range(3)), examples.collate(range(3, 16))]
    tokens = sum(shard.target_weight for shard in shards)
    sides = []
    for shard in shards:  # what each worker adds, with a step of the averaged gradient
        task = Seq2SeqLM.from_preset(tiny_bart_dir)
        start = {k: v.detach().clone() for k, v in task.backbone.state_dict().items()}
        _, moved = trained(task, [shard], tokens, world_size=2)
        sides.append({k: moved[k] - start[k] for k in start})
    for name, weight in expected.items():
        averaged = start[name] + (sides[0][name] + sides[1][name]) / 2
        torch.testing.assert_close(averaged, weight, atol=1e-6, rtol=1e-5, msg=name)


def test_clipping_bounds_the_whole_gradient(task, examples):
    before = {k: v.detach().clone() for k, v in task.backbone.named_parameters()}
    trained(task, [examples.collate(range(8))], clip_norm=0.01)
    moved = [(p - before[name]).norm() for name, p in task.backbone.named_parameters()]
    assert torch.stack(moved).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_bf16_stays_near_fp32_and_keeps_fp32_weights(tiny_bart_dir, examples):
    batch = examples.collate(range(16))
    exact, _ = trained(Seq2SeqLM.from_preset(tiny_bart_dir), [batch])
    task = Seq2SeqLM.from_preset(tiny_bart_dir)
    rough, weights = trained(task, [batch], precision="bf16")
    assert rough != exact
    assert rough == pytest.approx(exact, rel=0.02)
    assert {w.dtype for w in weights.values()} == {torch.float32}


def test_half_precision_weights_are_refused(task):
    task.backbone.bfloat16()
    with pytest.raises(SettingsError, match="must be float32"):
        sgd_step(task)


def test_a_batch_without_targets_and_a_nan_are_errors(task, examples):
    step = sgd_step(task)
    batch = examples.collate(range(4))
    empty = Batch(batch.inputs, batch.labels, batch.weights * 0, batch.real_tokens, batch.padded_tokens, 0.0)
    with pytest.raises(SettingsError, match="no real target token"):
        step([empty], Totals())
    with pytest.raises(NonFiniteLossError, match="step 0"):
        step.check_finite({"loss": math.nan})


def test_state_dict_continues_the_schedule_and_moments(tiny_bart_dir, examples):
    def build() -> tuple[Seq2SeqLM, TrainStep]:
        task = Seq2SeqLM.from_preset(tiny_bart_dir)
        task.backbone.eval()
        optimizer = torch.optim.Adam(task.backbone.parameters(), lr=1e-3)
        return task, TrainStep(
            task.backbone, optimizer, scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))
        )

    batches = [examples.collate(range(i, i + 8)) for i in (0, 8, 16)]
    whole, step = build()
    for batch in batches:
        step([batch], Totals())
    first, step_a = build()
    for batch in batches[:2]:
        step_a([batch], Totals())
    second, step_b = build()
    second.backbone.load_state_dict(first.backbone.state_dict())
    step_b.load_state_dict(step_a.state_dict())
    assert step_b.learning_rate == pytest.approx(1e-3 / 3)
    step_b([batches[2]], Totals())
    for name, weight in whole.backbone.state_dict().items():
        assert torch.equal(second.backbone.state_dict()[name], weight), name
