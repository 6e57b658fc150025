"""One optimizer step: forward, summed fp32 cross-entropy over the global number of real tokens, backward, clip, update.

`fit` and distributed training share it, so that neither the number of micro-batches nor that of workers changes the
loss.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from s2s_ray.errors import S2SRayError, SettingsError
from s2s_ray.training.batches import Batch
from s2s_ray.training.compiled import ACCURACY, PERPLEXITY
from s2s_ray.training.distributed import World
from s2s_ray.training.loss import CrossEntropy, cross_entropy

Precision = Literal["fp32", "bf16"]

# Without cuDNN: it plans anew for every shape, and nearly every training batch has a shape of its own.
_ATTENTION_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class NonFiniteLossError(S2SRayError, ArithmeticError):
    """The loss became NaN or infinite; the message names the step."""


@dataclass(slots=True)
class Totals:
    """Sums over batches, kept on the device until they are read: reading is the only thing that waits for it."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    divisor: float = 0.0
    target_weight: float = 0.0
    real_tokens: int = 0
    padded_tokens: int = 0

    def add(self, name: str, value: Tensor) -> None:
        """Add a detached fp32 scalar under `name`."""
        value = value.detach().double() if value.device.type != "mps" else value.detach()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def count(self, batch: Batch, divisor: float) -> None:
        """Count a batch's tokens, all known on the host."""
        self.divisor += divisor
        self.target_weight += batch.target_weight
        self.real_tokens += batch.real_tokens
        self.padded_tokens += batch.padded_tokens

    def over(self, world: World) -> "Totals":
        """The sums over all workers, which must ask together, each with the same names; waits for the device."""
        if world.size == 1:
            return self
        names = sorted(self.sums)
        counts = self.divisor, self.target_weight, self.real_tokens, self.padded_tokens
        values = world.sum([*(float(self.sums[name]) for name in names), *counts])
        sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in zip(names, values, strict=False)}
        divisor, weight, real, padded = values[len(names) :]
        return Totals(sums, divisor, weight, int(real), int(padded))

    def results(self) -> dict[str, float]:
        """Loss and metrics as means; waits for the device."""
        values = {name: float(total) for name, total in self.sums.items()}
        results = {"loss": values["loss"] / max(self.divisor, 1e-30)} if "loss" in values else {}
        weight = max(self.target_weight, 1e-30)
        if ACCURACY in values:
            results[ACCURACY] = values[ACCURACY] / weight
        if PERPLEXITY in values:
            results[PERPLEXITY] = float(torch.tensor(values[PERPLEXITY] / weight).exp())
        return results


@dataclass(slots=True)
class Forward:
    """A forward pass that also sums loss and metrics; evaluation is this alone."""

    model: Callable[..., Any]
    loss: CrossEntropy
    metrics: tuple[str, ...] = ()
    precision: Precision = "fp32"

    def __call__(self, batch: Batch, totals: Totals) -> Tensor:
        """The batch's summed loss (fp32 scalar, with its graph); `totals` gets everything but the graph."""
        device = batch.labels.device.type
        autocast: Any = torch.autocast(device, torch.bfloat16) if self.precision == "bf16" else contextlib.nullcontext()
        kernels: Any = sdpa_kernel(_ATTENTION_KERNELS) if device == "cuda" else contextlib.nullcontext()
        head = partial(
            cross_entropy,
            labels=batch.labels,
            weights=batch.weights,
            label_smoothing=self.loss.label_smoothing,
            count_hits=ACCURACY in self.metrics,
        )
        with kernels, autocast:  # the head inside the model, where its weights are whole in all of training
            sums = self.model(batch.inputs, packing=batch.packing, head=head)
        totals.add("loss", sums.loss)
        totals.count(batch, self.divisor(batch))
        for name, value in ((ACCURACY, sums.hits), (PERPLEXITY, sums.negative_log_likelihood)):
            if name in self.metrics:
                totals.add(name, value)
        loss: Tensor = sums.loss
        return loss

    def divisor(self, batch: Batch) -> float:
        """What the batch's loss sum is divided by, known on the host."""
        if self.loss.reduction == "keras":
            return float(batch.padded_targets if batch.real_tokens else 0)  # a worker's empty share adds no padding
        return batch.target_weight


class TrainStep:
    """Calling it with the micro-batches of one optimizer step trains `model` by that step.

    `world_size` workers take a step together, each with its own micro-batches and the same `divisor`; their gradients
    are averaged by DistributedDataParallel or `fully_shard`, which is undone here. The loss over k micro-batches, or k
    workers, is that of one batch that holds all their rows.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        loss: CrossEntropy | None = None,
        metrics: tuple[str, ...] = (),
        scheduler: LRScheduler | None = None,
        clip_norm: float | None = None,
        precision: Precision = "fp32",
        world_size: int = 1,
    ) -> None:
        half = sorted({str(p.dtype) for p in model.parameters() if p.requires_grad and p.dtype != torch.float32})
        if half:
            raise SettingsError(
                f"trainable weights must be float32: small updates vanish in {half[0]}. Load the preset with "
                "dtype='float32' and train with precision='bf16'"
            )
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.clip_norm = clip_norm
        self.forward = Forward(model, loss or CrossEntropy(), metrics, precision)
        self.world_size = world_size
        self.steps = 0

    def __call__(self, batches: Sequence[Batch], totals: Totals, divisor: float | None = None) -> None:
        """Train by one step on micro-batches that are on the model's device; sums go to `totals`.

        divisor: the real target tokens of this step over all workers; by default those of `batches`.
        """
        if divisor is None:
            divisor = sum(self.forward.divisor(batch.whole or batch) for batch in batches)
        if divisor <= 0:
            raise SettingsError(
                f"step {self.steps + 1} has no real target token: sample_weight must not be 0 everywhere"
            )
        for number, batch in enumerate(batches, start=1):
            if batch.seed is not None:
                torch.manual_seed(batch.seed)
            with self._synchronised(number == len(batches)):
                loss_sum = self.forward(batch, totals)
                (loss_sum * (self.world_size / divisor)).backward()
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters(), self.clip_norm)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1

    @property
    def learning_rate(self) -> float:
        """The rate the next step uses."""
        return float(self.optimizer.param_groups[0]["lr"])

    def check_finite(self, results: dict[str, float]) -> None:
        """Raise NonFiniteLossError when the loss read from the totals is no number."""
        loss = results.get("loss", 0.0)
        if not abs(loss) < float("inf"):
            raise NonFiniteLossError(
                f"the loss is {loss} at or before step {self.steps}; lower the learning rate, add warmup_steps or "
                "clip_norm, and check sample_weight"
            )

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, schedule and step number; the weights are the preset's."""
        scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        return {"optimizer": self.optimizer.state_dict(), "scheduler": scheduler, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.steps = int(state["steps"])

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _synchronised(self, is_last: bool) -> Any:
        """Workers exchange gradients once a step, with the last micro-batch."""
        no_sync = getattr(self.model, "no_sync", None)
        return contextlib.nullcontext() if is_last or no_sync is None else no_sync()
