"""`fit` on a real local Ray: the figures and weights of one process, from a Dataset or from what `fit` takes anyway."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from s2s_ray import Seq2SeqLM
from s2s_ray.errors import InfrastructureError, InputError, SettingsError
from s2s_ray.training.callbacks import Callback, EarlyStopping, WeightAverage
from s2s_ray.training.optimizers import OptimizerSettings
from s2s_ray.training.step import NonFiniteLossError

ADAMW = OptimizerSettings(name="adamw", learning_rate=3e-3, schedule="linear", warmup_steps=2, clip_norm=1.0)
SIDES = {"text_column": "document", "summary_column": "summary"}


@pytest.fixture(scope="module")
def pairs(english_text: list[str]) -> dict[str, list[str]]:
    """A number of rows that leaves a last batch of one row: less than there are workers."""
    texts = english_text[:49]
    return {"encoder_text": texts, "decoder_text": [" ".join(t.split()[: 2 + i % 5]) for i, t in enumerate(texts)]}


def make_task(directory: Path, **compiled: Any) -> Seq2SeqLM:
    task = Seq2SeqLM.from_preset(directory)
    for module in (task.backbone, *task.backbone.encoder_layers, *task.backbone.decoder_layers):
        module.dropout = 0.0
    task.compile(**{"optimizer": ADAMW, **compiled})
    return task


def dataset(pairs: dict[str, list[str]], rows: slice = slice(None), blocks: int = 1) -> Any:
    import ray.data

    columns = zip(pairs["encoder_text"][rows], pairs["decoder_text"][rows], strict=True)
    items = [{"document": source, "summary": target} for source, target in columns]
    return ray.data.from_items(items, override_num_blocks=blocks)


def weights_of(task: Seq2SeqLM) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in task.backbone.parameters()])


@pytest.mark.full
def test_two_workers_give_the_figures_and_weights_of_one_process(
    tiny_bart_dir: Path, pairs: dict[str, list[str]], local_ray: None
) -> None:
    options: dict[str, Any] = {"epochs": 3, "batch_size": 16, "accumulation_steps": 2, "seed": 4, "verbose": 0}

    def fitted(x: Any, validation_data: Any, **more: Any) -> tuple[Seq2SeqLM, dict[str, list[float]]]:
        task = make_task(tiny_bart_dir)
        task.generate("this packs the weights")
        callbacks = [WeightAverage(0.5), EarlyStopping(patience=5)]
        history = task.fit(x, validation_data=validation_data, callbacks=callbacks, **options, **more)
        assert history.epoch == [0, 1, 2]
        return task, history.history

    alone, expected = fitted(pairs, {side: texts[:10] for side, texts in pairs.items()})
    task, found = fitted(
        dataset(pairs, blocks=5), dataset(pairs, slice(10)), num_workers=2, cpus_per_worker=0.5, **SIDES
    )
    assert expected["val_loss"][-1] < expected["val_loss"][0] and found.keys() == expected.keys()
    for name in found.keys() - {"tokens_per_second", "padding_share"}:
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    assert weights_of(task) == pytest.approx(weights_of(alone), abs=1e-4)
    texts = pairs["encoder_text"][:4]
    assert task.generate(texts, max_new_tokens=8) == alone.generate(texts, max_new_tokens=8)
    with pytest.raises(InputError, match="an empty Dataset"):
        task.fit(dataset(pairs).limit(0), **SIDES)
    with pytest.raises(NonFiniteLossError):  # from a worker
        make_task(tiny_bart_dir, optimizer=OptimizerSettings(name="sgd", learning_rate=1e30)).fit(
            pairs, num_workers=2, cpus_per_worker=0.5, verbose=0
        )


@pytest.mark.full
def test_a_lost_worker_leaves_the_task_as_it_was(
    tiny_bart_dir: Path, pairs: dict[str, list[str]], local_ray: None
) -> None:
    class Dies(Callback):  # in here, so that it is sent by value
        def on_train_batch_end(self, step: int) -> None:
            if step == 2 and torch.distributed.get_rank() == 1:
                os._exit(1)

    task = make_task(tiny_bart_dir)
    before = weights_of(task)
    with pytest.raises(InfrastructureError, match="training failed"):
        task.fit(pairs, num_workers=2, cpus_per_worker=0.5, callbacks=[Dies()], verbose=0, batch_size=16)
    assert torch.equal(weights_of(task), before)


def test_what_workers_cannot_do_is_refused(tiny_bart_dir: Path, pairs: dict[str, list[str]], local_ray: None) -> None:
    task = make_task(tiny_bart_dir)
    before = weights_of(task)
    with pytest.raises(InputError, match=r"must have the columns document, target .*Received: document, summary"):
        task.fit(dataset(pairs), text_column="document", summary_column="target")
    broken = {**pairs, "encoder_text": [None, *pairs["encoder_text"][1:]]}
    with pytest.raises(InputError, match="in a block of the Dataset: training row 0"):
        task.fit(dataset(broken), **SIDES)
    with pytest.raises(SettingsError, match=r"the second of x\.train_test_split"):
        task.fit(dataset(pairs), validation_split=0.1, **SIDES)
    with pytest.raises(SettingsError, match="an iterable"):
        task.fit([pairs], num_workers=2)
    with pytest.raises(SettingsError, match="num_workers must be"):
        task.fit(pairs, num_workers=0)
    with pytest.raises(SettingsError, match="device must be"):
        task.fit(pairs, num_workers=2, device="gpu")
    with pytest.raises(TypeError, match="batchsize"):
        task.fit(pairs, num_workers=2, batchsize=3)
    task.compile(optimizer=torch.optim.SGD(task.backbone.parameters(), lr=0.1))
    with pytest.raises(SettingsError, match=r"a torch Optimizer holds the weights of this process. Received: SGD"):
        task.fit(pairs, num_workers=2)
    assert torch.equal(weights_of(task), before)
