"""Hooks into `fit`, with Keras' names where Keras has the hook."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from s2s_ray.errors import SettingsError


class Callback:
    """Base of callbacks; override what is needed. `task` is the task in training, set before the first hook.

    Setting `stop_training` ends the training after the current epoch.
    """

    task: Any = None
    stop_training: bool = False

    def on_train_begin(self) -> None:
        """Before the first step."""

    def on_epoch_begin(self, epoch: int) -> None:
        """Before an epoch's first step; epochs count from 0."""

    def on_train_batch_end(self, step: int) -> None:
        """After an optimizer step; `step` counts from 1 over all epochs. No loss here: reading it would wait for the
        device.
        """

    def on_test_begin(self, epoch: int) -> None:
        """After an epoch's last step, before its validation; called without validation data too."""

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        """After an epoch's validation, the model in evaluation mode. What is added to `logs` enters the history."""

    def on_train_end(self) -> None:
        """After the last epoch."""


class WeightAverage(Callback):
    """Exponential moving average of the weights (Polyak), used for validation and kept at the end.

    After step t the average moves to the weights by 1 - min(decay, (1 + t) / (10 + t)), so that early steps do not
    linger.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 < decay < 1:
            raise SettingsError(f"decay must be between 0 and 1. Received: {decay!r}")
        self.decay = decay
        self._average: list[Tensor] = []
        self._swapped = False

    def on_train_begin(self) -> None:
        self._average = [p.detach().clone() for p in self._weights()]

    def on_epoch_begin(self, epoch: int) -> None:
        self._use_average(False)

    def on_train_batch_end(self, step: int) -> None:
        with torch.no_grad():
            weight = 1 - min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self._average, self._weights(), weight)

    def on_test_begin(self, epoch: int) -> None:
        self._use_average(True)

    def on_train_end(self) -> None:
        self._use_average(True)

    def _weights(self) -> list[Tensor]:
        return [p for p in self.task.backbone.parameters() if p.requires_grad]

    def _use_average(self, use: bool) -> None:
        if use == self._swapped:
            return
        with torch.no_grad():
            for weight, average in zip(self._weights(), self._average, strict=True):
                kept = weight.clone()
                weight.copy_(average)
                average.copy_(kept)
        self._swapped = use


class EarlyStopping(Callback):
    """Stop when `monitor` has not improved for `patience` epochs; restore the best weights at the end.

    `mode` is "min" or "max". List it after WeightAverage, so that it keeps averaged weights.
    """

    def __init__(
        self, monitor: str = "val_loss", patience: int = 0, *, mode: str = "min", restore_best_weights: bool = True
    ) -> None:
        if mode not in ("min", "max"):
            raise SettingsError(f'mode must be "min" or "max". Received: {mode!r}')
        self.monitor = monitor
        self.patience = patience
        self.sign = 1.0 if mode == "min" else -1.0
        self.restore_best_weights = restore_best_weights
        self.best_epoch = -1
        self._best = float("inf")
        self._weights: Mapping[str, Tensor] = {}

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        if self.monitor not in logs:
            raise SettingsError(f"monitor must be one of {', '.join(logs)}. Received: {self.monitor!r}")
        value = self.sign * logs[self.monitor]
        if value < self._best:
            self._best, self.best_epoch = value, epoch
            if self.restore_best_weights:
                self._weights = {k: v.detach().clone() for k, v in self.task.backbone.state_dict().items()}
        self.stop_training = epoch - self.best_epoch >= self.patience and value >= self._best

    def on_train_end(self) -> None:
        if self._weights:
            self.task.backbone.load_state_dict(self._weights)
