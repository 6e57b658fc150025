"""`Seq2SeqLM.fit`: epochs over the data, validation, history. The step itself is training/step.py."""

import contextlib
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import torch

from s2s_ray.errors import InputError, SettingsError
from s2s_ray.text.preprocessor import Seq2SeqLMPreprocessor
from s2s_ray.training.batches import Batch
from s2s_ray.training.callbacks import Callback
from s2s_ray.training.compiled import TrainingSetup, check_compiled
from s2s_ray.training.distributed import World, distribute, freeze_unreached
from s2s_ray.training.feed import on_device
from s2s_ray.training.inputs import DataSettings, InMemory, Preprocessed, TrainingData, open_data
from s2s_ray.training.optimizers import OptimizerSettings, build_optimizer
from s2s_ray.training.progress import Progress, Verbose
from s2s_ray.training.step import Forward, Precision, Totals, TrainStep

EVALUATION_BATCH_SIZE = 32


@dataclass(slots=True)
class History:
    """What `fit` returns, as Keras: `history` maps each figure to its values, `epoch` lists the epochs (from 0).

    Besides loss and metrics (`val_` for validation) there are `learning_rate` (of the last step), `tokens_per_second`
    (real source and target tokens) and `padding_share`.
    """

    history: dict[str, list[float]] = field(default_factory=dict)
    epoch: list[int] = field(default_factory=list)
    params: dict[str, Any] = field(default_factory=dict)

    def add(self, epoch: int, logs: dict[str, float]) -> None:
        """Append one epoch's figures."""
        self.epoch.append(epoch)
        for name, value in logs.items():
            self.history.setdefault(name, []).append(value)


def fit(
    task: Any,
    x: Any = None,
    y: Any = None,
    batch_size: int | None = None,
    epochs: int = 1,
    verbose: Verbose = "auto",
    callbacks: Sequence[Callback] | None = None,
    validation_split: float = 0.0,
    validation_data: Any = None,
    shuffle: bool = True,
    sample_weight: Any = None,
    initial_epoch: int = 0,
    steps_per_epoch: int | None = None,
    validation_steps: int | None = None,
    validation_batch_size: int | None = None,
    validation_freq: int = 1,
    *,
    batch_tokens: int | None = None,
    accumulation_steps: int = 1,
    precision: Precision | Literal["auto"] = "auto",
    seed: int = 0,
    text_column: str = "encoder_text",
    summary_column: str = "decoder_text",
    source_lang_column: str | None = None,
    target_lang_column: str | None = None,
    max_source_length: int | None = None,
    max_target_length: int | None = None,
    world: World | None = None,
) -> History:
    """Train the task's backbone in place, by Keras' names and meaning of the first sixteen arguments.

    x: a dict of `encoder_text` and `decoder_text`, maybe of `source_lang` and `target_lang` (one for all, or one per
    pair); a pyarrow Table or Parquet path(s) with `text_column`, `summary_column`, and maybe columns of languages; a
    dict of preprocessed arrays with y `[N, T]` and sample_weight; or an iterable (a DataLoader) of any of these as
    batches. An iterable is iterated anew each epoch. Text in memory and in files is tokenised
    once and held as ids, 4 bytes a token.

    `batch_tokens` bounds the padded tokens of a batch (source and target) in place of `batch_size` (32).
    `accumulation_steps` batches make one optimizer step, with the loss of one big batch. precision "auto" is bf16
    autocast on CUDA and fp32 elsewhere; the weights stay fp32. Equal arguments and seed give equal training on a CPU.
    `world`: the processes of a torch.distributed group that call this together, with the same arguments; they share the
    rows of every batch, and all end with the same weights.

    Raises SettingsError or InputError for arguments that cannot be used, NonFiniteLossError when training diverges.
    """
    world = world or World(0, 1, next(task.backbone.parameters()).device)
    settings = DataSettings(
        text_column=text_column,
        summary_column=summary_column,
        source_lang_column=source_lang_column,
        target_lang_column=target_lang_column,
        batch_size=32 if batch_size is None else batch_size,
        batch_tokens=batch_tokens,
        shuffle=shuffle,
        seed=seed,
        max_source_length=max_source_length,
        max_target_length=max_target_length,
    )
    for name, value in (("epochs", epochs), ("accumulation_steps", accumulation_steps)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SettingsError(f"{name} must be a whole number of at least 1. Received: {value!r}")
    plain = settings.for_validation(validation_batch_size)
    data, validation = open_both(
        x, y, sample_weight, validation_data, validation_split, task.preprocessor, settings, plain
    )
    trainer = _Trainer(
        task=task,
        data=data,
        validation=validation,
        world=world,
        epochs=epochs,
        accumulation_steps=accumulation_steps,
        steps_per_epoch=steps_per_epoch,
        validation_steps=validation_steps,
        validation_freq=validation_freq,
        verbose=verbose,
        callbacks=list(callbacks or ()),
        precision=_precision(precision, world.device),
    )
    devices = [world.device] if world.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed + world.rank)
        return trainer.run(initial_epoch)


def evaluate(
    task: Any,
    x: Any = None,
    y: Any = None,
    batch_size: int | None = None,
    sample_weight: Any = None,
    steps: int | None = None,
    *,
    batch_tokens: int | None = None,
    precision: Precision | Literal["auto"] = "auto",
    text_column: str = "encoder_text",
    summary_column: str = "decoder_text",
    source_lang_column: str | None = None,
    target_lang_column: str | None = None,
) -> dict[str, float]:
    """Loss and weighted metrics over the data, without training; the same forms of data as `fit`."""
    settings = DataSettings(
        text_column=text_column,
        summary_column=summary_column,
        source_lang_column=source_lang_column,
        target_lang_column=target_lang_column,
        batch_size=batch_size or EVALUATION_BATCH_SIZE,
        batch_tokens=batch_tokens,
        shuffle=False,
    )
    device = next(task.backbone.parameters()).device
    data = open_data(x, y, sample_weight, task.preprocessor, settings)
    return _evaluate(task, data, World(0, 1, device), _precision(precision, device), steps)


def _evaluate(task: Any, data: TrainingData, world: World, precision: Precision, steps: int | None) -> dict[str, float]:
    setup = training_setup(task)
    totals = Totals()
    forward = Forward(task.backbone, setup.loss, setup.weighted_metrics, precision)
    was_training = task.backbone.training
    task.backbone.eval()
    with torch.no_grad():
        for batch in on_device(_shares(islice(data.batches(0), steps), world), world.device):
            forward(batch, totals)
    task.backbone.train(was_training)
    return totals.over(world).results()


def _shares(batches: Iterable[Batch], world: World) -> Iterator[Batch]:
    return (batch.share(world.rank, world.size) for batch in batches)


def training_setup(task: Any) -> TrainingSetup:
    """What the task was compiled with."""
    return check_compiled(task.optimizer, task.loss, task.weighted_metrics)


@dataclass(slots=True, kw_only=True)
class _Trainer:
    task: Any
    data: TrainingData
    validation: TrainingData | None
    world: World
    epochs: int
    accumulation_steps: int
    steps_per_epoch: int | None
    validation_steps: int | None
    validation_freq: int
    verbose: Verbose
    callbacks: list[Callback]
    precision: Precision
    history: History = field(default_factory=History)
    stream: Generator[Batch] | None = None

    def run(self, initial_epoch: int) -> History:
        setup = training_setup(self.task)
        if self.world.size > 1:
            freeze_unreached(self.task.backbone, pad=0)
        model = distribute(self.task.backbone, self.world, "ddp")
        optimizer, scheduler = build_optimizer(setup.optimizer, self.task.backbone, self._total_steps(initial_epoch))
        clip = setup.optimizer.clip_norm if isinstance(setup.optimizer, OptimizerSettings) else None
        step = TrainStep(
            model,
            optimizer,
            loss=setup.loss,
            metrics=setup.weighted_metrics,
            scheduler=scheduler,
            clip_norm=clip,
            precision=self.precision,
            world_size=self.world.size,
        )
        self.history.params = {"epochs": self.epochs, "steps": self._steps(initial_epoch), "verbose": self.verbose}
        for callback in self.callbacks:
            callback.task = self.task
            callback.stop_training = False
            callback.on_train_begin()
        try:
            for epoch in range(initial_epoch, self.epochs):
                self._epoch(step, epoch)
                if any(callback.stop_training for callback in self.callbacks):
                    break
        finally:
            self.task.backbone.eval()
            if self.stream is not None:
                self.stream.close()
        for callback in self.callbacks:
            callback.on_train_end()
        return self.history

    def _epoch(self, step: TrainStep, epoch: int) -> None:
        for callback in self.callbacks:
            callback.on_epoch_begin(epoch)
        self.task.backbone.train()
        totals = Totals()
        progress = Progress(self.verbose, epoch, self.epochs, self._steps(epoch))
        started, rate = time.monotonic(), step.learning_rate
        for batches in self._groups(epoch):
            rate = step.learning_rate
            step(batches, totals)
            for callback in self.callbacks:
                callback.on_train_batch_end(step.steps)
            progress.advance(lambda: self._read(step, totals, started))
        if not totals.padded_tokens:
            raise InputError(
                "the data gave no batch in this epoch: it is empty, or an iterator that can be read only once "
                "(pass a list, a DataLoader, or steps_per_epoch)"
            )
        totals = totals.over(self.world)
        logs = self._read(step, totals, started)
        logs["learning_rate"] = rate
        logs["padding_share"] = 1 - totals.real_tokens / totals.padded_tokens
        self.task.backbone.eval()
        self._finish_epoch(epoch, logs)
        progress.close(logs)
        self.history.add(epoch, logs)

    def _finish_epoch(self, epoch: int, logs: dict[str, float]) -> None:
        for callback in self.callbacks:
            callback.on_test_begin(epoch)
        if self.validation is not None and (epoch + 1) % self.validation_freq == 0:
            results = _evaluate(self.task, self.validation, self.world, self.precision, self.validation_steps)
            logs.update({f"val_{name}": value for name, value in results.items()})
        for callback in self.callbacks:
            callback.on_epoch_end(epoch, logs)

    def _read(self, step: TrainStep, totals: Totals, started: float) -> dict[str, float]:
        results = totals.results()
        step.check_finite(results)
        results["tokens_per_second"] = totals.real_tokens / max(time.monotonic() - started, 1e-9)
        return results

    def _groups(self, epoch: int) -> Iterator[list[Batch]]:
        """Micro-batches of each optimizer step, on the device."""
        with contextlib.ExitStack() as stack:
            if self.steps_per_epoch is None:
                shares = _shares(self.data.batches(epoch), self.world)
                batches = stack.enter_context(contextlib.closing(on_device(shares, self.world.device)))
            else:  # as in Keras, the next epoch goes on where this one stopped
                self.stream = self.stream or on_device(_shares(self._endless(epoch), self.world), self.world.device)
                batches = self.stream
            groups = iter(lambda: list(islice(batches, self.accumulation_steps)), [])
            yield from islice(groups, self.steps_per_epoch)

    def _endless(self, epoch: int) -> Iterator[Batch]:
        while True:
            empty = True
            for batch in self.data.batches(epoch):
                empty = False
                yield batch
            if empty:
                return
            epoch += 1

    def _steps(self, epoch: int) -> int | None:
        if self.steps_per_epoch is not None:
            return self.steps_per_epoch
        batches = self.data.steps(epoch)
        return None if batches is None else -(-batches // self.accumulation_steps)

    def _total_steps(self, initial_epoch: int) -> int | None:
        steps = [self._steps(epoch) for epoch in range(initial_epoch, self.epochs)]
        return None if None in steps else sum(s for s in steps if s is not None)


def open_both(
    x: Any,
    y: Any,
    sample_weight: Any,
    validation_data: Any,
    validation_split: float,
    preprocessor: Seq2SeqLMPreprocessor | None,
    settings: DataSettings,
    validation_settings: DataSettings,
) -> tuple[TrainingData, TrainingData | None]:
    """What to train on and what to validate on. validation_data as in Keras: x alone, (x, y), (x, y, sample_weight)."""
    data = open_data(x, y, sample_weight, preprocessor, settings)
    if validation_data is not None:
        is_tuple = isinstance(validation_data, tuple) and 2 <= len(validation_data) <= 3
        x, y, weight = (*validation_data, None)[:3] if is_tuple else (validation_data, None, None)
        return data, open_data(x, y, weight, preprocessor, validation_settings)
    if not validation_split:
        return data, None
    if not isinstance(data, (InMemory, Preprocessed)):
        raise SettingsError("validation_split needs data of known length; pass validation_data with an iterable")
    return data.split(validation_split)


def _precision(precision: str, device: torch.device) -> Precision:
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    if precision not in ("fp32", "bf16"):
        raise SettingsError(f'precision must be "auto", "fp32" or "bf16". Received: {precision!r}')
    return precision  # type: ignore[return-value]
