"""The training loop of the fine-tuning job: steps, evaluations and checkpoints on any number of workers, no Ray.

Everything random is a function of seed, step and place in the step, so a run that goes on from a checkpoint, alone or
with other workers, continues the same curve.
"""

import contextlib
import copy
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2s_ray.models.loading import build_backbone
from s2s_ray.nn.lora import lora_layers, merge_lora
from s2s_ray.seq2seq_lm import Seq2SeqLM
from s2s_ray.text.tokenizer import read_json_object
from s2s_ray.training import checkpoint as files
from s2s_ray.training.arithmetic import Arithmetic, matrix_rate
from s2s_ray.training.batches import BatchPlan, Examples, Mixture
from s2s_ray.training.checkpoint import Checkpoints, Writer
from s2s_ray.training.distributed import (
    Strategy,
    World,
    compile_layers,
    distribute,
    freeze_unreached,
    full,
    like,
    load_optimizer,
    optimizer_tensors,
    recompute_activations,
)
from s2s_ray.training.evaluation import Validation, best_step, evaluate, evaluations_since_best
from s2s_ray.training.feed import on_device
from s2s_ray.training.loss import CrossEntropy
from s2s_ray.training.optimizers import OptimizerSettings, build_optimizer, set_step
from s2s_ray.training.step import Precision, Totals, TrainStep
from s2s_ray.training.steps import Rows, StepPlan, worker_batches

KEPT_CHECKPOINTS = 2  # the newest, beside the best: one more than needed, should the newest be damaged


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """How to train. Tokens are padded, source and target together; `batch_tokens` of all workers in one step,
    `micro_batch_tokens` of one worker in one forward pass. `best_metric` names what decides which checkpoint is best;
    after `patience` evaluations without a better one training ends. `average_decay` keeps a moving average of the
    weights, which is then what is evaluated and saved.
    """

    optimizer: OptimizerSettings
    loss: CrossEntropy = field(default_factory=CrossEntropy)
    epochs: int | None = 1
    max_steps: int | None = None
    batch_tokens: int = 65_536
    micro_batch_tokens: int = 16_384
    mixture: Mixture | None = None
    seed: int = 0
    precision: Precision = "fp32"
    strategy: Strategy = "ddp"
    compile_layers: bool = False
    recompute_activations: bool = False
    average_decay: float | None = None
    log_every: int = 50
    checkpoint_every: int = 500
    evaluate_every: int | None = None
    best_metric: str = "val_loss"
    patience: int | None = None


class Loop:
    """One training run of one worker; all workers are given the same arguments.

    make_task: the task to train, the same at every call. emit: called on rank 0 with each event, a dict of plain
    values with a `kind`: start, log, evaluation, checkpoint.
    """

    def __init__(
        self,
        make_task: Callable[[], Seq2SeqLM],
        examples: Examples,
        settings: LoopSettings,
        checkpoints: Checkpoints,
        *,
        world: World,
        validation: Validation | None = None,
        emit: Callable[[dict[str, Any]], None] = lambda event: None,
    ) -> None:
        self.settings, self.world, self.checkpoints = settings, world, checkpoints
        self.examples, self.validation = examples, validation
        self.emit = emit if world.rank == 0 else lambda event: None
        plan = BatchPlan(
            examples.sources.lengths,
            examples.labels.lengths,
            batch_tokens=settings.micro_batch_tokens,
            seed=settings.seed,
            mixture=settings.mixture,
        )
        micro_batches = max(1, settings.batch_tokens // settings.micro_batch_tokens)
        self.steps = StepPlan(plan, micro_batches, settings.epochs, settings.max_steps)
        self.writer = Writer()
        self.log: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.start = 0
        self._operations = 0.0
        self._prepare(make_task)

    def run(self) -> None:
        """Train to the end, or until `patience` runs out; the last checkpoint is then of the last step."""
        pids = self.world.gather(os.getpid())
        self.emit({"kind": "start", "step": self.start, "steps": self.steps.total_steps, "pids": pids})
        if not self._is_over(self.start):
            batches = worker_batches(self.examples, copy.copy(self.steps), self.start, self.world.rank, self.world.size)
            with contextlib.closing(on_device(batches, self.world.device)) as stream:
                rate = matrix_rate(self.world.device, self.settings.precision) if self.world.rank == 0 else 1.0
                self._peak = rate * self.world.size
                self._totals, self._since = Totals(), time.monotonic()
                for step in range(self.start, self.steps.total_steps):
                    share = -(-len(self.steps.rows(step)) // self.world.size)
                    rate = self.step.learning_rate
                    self.step(list(islice(stream, share)), self._totals, self.steps.target_tokens(step))
                    self._operations += sum(map(self._operations_of, self.steps.rows(step)))
                    self._follow(step + 1)
                    self._record(step + 1, rate)
                    if self._is_over(step + 1):
                        break
        self.writer.wait()

    def best_step(self) -> int:
        """The step of the best evaluation, or without any of the last checkpoint."""
        return best_step(self.evaluations, self.settings.best_metric) or self.log[-1]["step"]

    # What is set up once.

    def _prepare(self, make_task: Callable[[], Seq2SeqLM]) -> None:
        settings, task = self.settings, make_task()
        self.backbone = task.backbone
        self.replica = make_task() if self.world.rank == 0 or self.validation is not None else None
        if self.replica is not None:
            merge_lora(self.replica.backbone)
            if self.validation is not None:
                self.replica.backbone.to(self.world.device)
        self.backbone.train()
        freeze_unreached(self.backbone, self.examples.pad)
        self.arithmetic = Arithmetic.of(self.backbone)
        saved = self._find_checkpoint()
        if saved is not None:
            self._load_weights(saved)
        if settings.recompute_activations:
            recompute_activations(self.backbone)
        if settings.compile_layers:
            compile_layers(self.backbone)
        model = distribute(self.backbone, self.world, settings.strategy)
        optimizer, scheduler = build_optimizer(settings.optimizer, self.backbone, self.steps.total_steps)
        self.trainable = {name: p for name, p in self.backbone.named_parameters() if p.requires_grad}
        self.average: dict[str, Tensor] = {}
        if settings.average_decay is not None:
            self.average = {name: p.detach().clone() for name, p in self.trainable.items()}
        self.step = TrainStep(
            model,
            optimizer,
            loss=settings.loss,
            scheduler=scheduler,
            clip_norm=settings.optimizer.clip_norm,
            precision=settings.precision,
            world_size=self.world.size,
        )
        if saved is not None:
            load_optimizer(optimizer, self.backbone, dict(files.read_tensors(saved, "optimizer/")))
            set_step(optimizer, scheduler, self.start)
            self.step.steps = self.start
            for name, value in files.read_tensors(saved, "average/"):
                self.average[name] = like(value, self.trainable[name].detach())

    def _find_checkpoint(self) -> Path | None:
        newest = None
        if self.world.rank == 0:
            newest = self.checkpoints.newest()
            self.checkpoints.keep_only({step for step in self.checkpoints.steps() if step <= (newest or 0)})
        newest = self.world.broadcast(newest)
        if newest is None:
            return None
        directory = self.checkpoints.fetch(newest)
        state = files.read_state(directory)
        self.start, self.log, self.evaluations = state["step"], state["log"], state["evaluations"]
        return directory

    def _load_weights(self, saved: Path) -> None:
        """Those of the checkpoint's preset, unless it holds others than were trained."""
        weights = dict(files.read_tensors(saved, "weights/"))
        if not weights:
            config = read_json_object(saved / "config.json")
            weights = dict(build_backbone(type(self.backbone), config, saved).state_dict())
        with torch.no_grad():
            for name, tensor in self.backbone.state_dict().items():
                if name in weights:
                    tensor.copy_(weights[name])

    # What follows a step.

    def _follow(self, step: int) -> None:
        """Move the average of the weights, at first faster so that the start does not linger."""
        if self.settings.average_decay is not None:
            weight = 1 - min(self.settings.average_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                for name, average in self.average.items():
                    average.lerp_(self.trainable[name].detach(), weight)

    def _record(self, step: int, rate: float) -> None:
        settings, last = self.settings, step == self.steps.total_steps
        evaluates = self.validation is not None and step % (settings.evaluate_every or settings.checkpoint_every) == 0
        saves = last or evaluates or step % settings.checkpoint_every == 0
        if saves or step % settings.log_every == 0:
            self._log(step, rate)
        if saves:
            self._save(step, self.validation is not None and (last or evaluates))

    def _operations_of(self, rows: Rows) -> float:
        return self.arithmetic.operations(self.examples.sources.lengths[rows], self.examples.labels.lengths[rows])

    def _log(self, step: int, rate: float) -> None:
        totals, local = self._totals, self._totals.sums["loss"]
        sums = (float(local), totals.divisor, totals.real_tokens, totals.padded_tokens)
        loss, divisor, real, padded = self.world.sum(sums)
        entry = {"step": step, "loss": loss / divisor, "learning_rate": rate, "padding_share": 1 - real / padded}
        self.step.check_finite(entry)
        seconds = time.monotonic() - self._since
        entry |= {"tokens_per_second": real / seconds, "epoch": self.steps.epoch_of(step - 1)}
        entry["mfu"] = self._operations / seconds / self._peak
        self._operations = 0.0
        self.log.append(entry)
        self.emit({"kind": "log", **entry})
        self._totals, self._since = Totals(), time.monotonic()

    def _save(self, step: int, evaluates: bool) -> None:
        started = time.monotonic()
        self.writer.wait()  # it may still be reading the replica
        self._update_replica()
        if evaluates:
            assert self.replica is not None and self.validation is not None
            figures = evaluate(self.replica, self.validation, self.world, self.settings.micro_batch_tokens)
            self.evaluations.append({"step": step, **figures})
            self.emit({"kind": "evaluation", **self.evaluations[-1]})
        tensors = self._trainer_tensors()
        if self.world.rank == 0:
            state = {"format": 1, "step": step, "log": list(self.log), "evaluations": list(self.evaluations)}
            self.writer.submit(partial(self._write, step, state, tensors))
        self._since += time.monotonic() - started  # not training time

    def _write(self, step: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        assert self.replica is not None
        task = self.replica

        def fill(directory: Path) -> None:
            task.write_files(directory)
            files.save_state(directory, state, tensors)

        self.checkpoints.write(step, fill)
        best = best_step(state["evaluations"], self.settings.best_metric)
        newest = sorted(s for s in self.checkpoints.steps() if s <= step)[-KEPT_CHECKPOINTS:]
        self.checkpoints.keep_only({*newest, *([best] if best else [])})
        self.emit({"kind": "checkpoint", "step": step})

    @torch.no_grad()
    def _update_replica(self) -> None:
        """Bring what is evaluated and saved, a plain task, to the weights of now, or to their average."""
        target = {} if self.replica is None else self.replica.backbone.state_dict()
        state, layers = self.backbone.state_dict(), lora_layers(self.backbone)

        def now(name: str) -> Tensor:
            return full(self.average.get(name, state[name]))

        for name in state:
            layer, _, last = name.rpartition(".")
            value = now(name)
            if layer in layers and last == "weight":
                value = value + layers[layer].scaling * now(f"{layer}.lora_b") @ now(f"{layer}.lora_a")
            if name in target:
                target[name].copy_(value)
        if self.replica is not None:
            self.replica.backbone.unpack()

    def _trainer_tensors(self) -> dict[str, Tensor]:
        """On the CPU, at rank 0 alone; all workers take part."""
        kept: dict[str, Tensor] = {}

        def keep(name: str, value: Tensor) -> None:
            if self.world.rank == 0:
                kept[name] = value.detach().to("cpu", copy=True)

        for name, value in optimizer_tensors(self.step.optimizer, self.backbone):
            keep(f"optimizer/{name}", value)
        for name, average in self.average.items():
            keep(f"average/{name}", full(average))
        if self.average or lora_layers(self.backbone):  # then the preset's weights are not those that are trained
            for name, parameter in self.trainable.items():
                keep(f"weights/{name}", full(parameter.detach()))
        return kept

    def _is_over(self, step: int) -> bool:
        patience = self.settings.patience
        if step >= self.steps.total_steps:
            return True
        since = evaluations_since_best(self.evaluations, self.settings.best_metric)
        return patience is not None and since >= patience
