"""Optimizers and learning-rate schedules by name."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from s2s_ray.errors import SettingsError

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SCHEDULES = ("constant", "linear", "cosine")
NAMES = ("adam", "adamw", "adafactor", "sgd")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """An optimizer for `compile(optimizer=...)`.

    `learning_rate` is the peak. It is reached after `warmup_steps` optimizer steps, then kept ("constant") or
    brought down to `final_learning_rate` by a straight line ("linear") or half a cosine ("cosine") at `total_steps`;
    None lets `fit` compute that from its epochs. `weight_decay` is decoupled for adamw and skips biases and norms;
    adam's and sgd's is the L2 term of torch. `clip_norm` bounds the global norm of the gradients. `epsilon` is
    Keras' 1e-7, not torch's 1e-8.
    """

    name: Literal["adam", "adamw", "adafactor", "sgd"] = "adam"
    learning_rate: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-7
    weight_decay: float = 0.0
    momentum: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None
    final_learning_rate: float = 0.0
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        _require(self.name in NAMES, "optimizer", f"one of {', '.join(NAMES)}", self.name)
        _require(self.schedule in SCHEDULES, "schedule", f"one of {', '.join(SCHEDULES)}", self.schedule)
        for field in ("learning_rate", "epsilon"):
            _require(_positive(getattr(self, field)), field, "a finite number above 0", getattr(self, field))
        for field in ("weight_decay", "momentum", "warmup_steps", "final_learning_rate"):
            value = getattr(self, field)
            _require(value == 0 or _positive(value), field, "a finite number of at least 0", value)
        for field in ("clip_norm", "total_steps"):
            value = getattr(self, field)
            _require(value is None or _positive(value), field, "above 0, or None", value)
        _require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", "two in [0, 1)", self.betas)


OptimizerLike = OptimizerSettings | Optimizer | OptimizerFactory


def check_optimizer(optimizer: object) -> OptimizerLike:
    """Settings from a name ("auto" is KerasHub's Adam(2e-5)); settings, torch optimizers and factories pass as they
    are.

    A factory takes the parameters and returns a torch Optimizer. Raises SettingsError that lists the known names.
    """
    if optimizer == "auto":
        return OptimizerSettings()
    if isinstance(optimizer, str) and optimizer in NAMES:
        decay = 0.01 if optimizer == "adamw" else 0.0
        return OptimizerSettings(name=cast(Any, optimizer), weight_decay=decay)
    if isinstance(optimizer, (OptimizerSettings, Optimizer)) or callable(optimizer):
        return optimizer  # type: ignore[return-value]
    raise SettingsError(
        f"optimizer must be one of auto, {', '.join(NAMES)}, OptimizerSettings(...), a torch Optimizer, or a function "
        f"of the parameters that returns one. Received: {optimizer!r}"
    )


def build_optimizer(
    optimizer: OptimizerLike, model: nn.Module, total_steps: int | None
) -> tuple[Optimizer, LambdaLR | None]:
    """The torch optimizer over the model's trainable parameters and, for settings, its schedule.

    `total_steps` is used when the settings name none. Raises SettingsError when a decaying schedule knows no end, or
    when a torch optimizer holds other parameters than the model's.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if isinstance(optimizer, OptimizerSettings):
        built = _build(optimizer, parameters)
        return built, _schedule(built, optimizer, total_steps)
    built = optimizer if isinstance(optimizer, Optimizer) else optimizer(parameters)
    if not isinstance(built, Optimizer):
        raise SettingsError(f"an optimizer function must return a torch Optimizer. Received: {type(built).__name__}")
    own = {id(p) for p in parameters}
    if not any(id(p) in own for group in built.param_groups for p in group["params"]):
        raise SettingsError("the optimizer must hold parameters of this task's backbone, and it holds none of them")
    return built, None


def _build(settings: OptimizerSettings, parameters: list[nn.Parameter]) -> Optimizer:
    fused: dict[str, Any] = {"fused": True} if all(p.is_cuda for p in parameters) else {}
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.name == "adafactor":
        return torch.optim.Adafactor(parameters, lr=rate, weight_decay=decay)
    if settings.name == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=settings.momentum, weight_decay=decay, **fused)
    adam: dict[str, Any] = {"lr": rate, "betas": settings.betas, "eps": settings.epsilon, **fused}
    if settings.name == "adam":
        return torch.optim.Adam(parameters, weight_decay=decay, **adam)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], **adam)


def _schedule(built: Optimizer, settings: OptimizerSettings, total_steps: int | None) -> LambdaLR | None:
    total = settings.total_steps if settings.total_steps is not None else total_steps
    if settings.schedule == "constant" and not settings.warmup_steps:
        return None
    if settings.schedule != "constant" and total is None:
        raise SettingsError(
            f"schedule={settings.schedule!r} must know its end: set total_steps, or steps_per_epoch in fit, as the "
            "data has no length"
        )
    return LambdaLR(built, lambda step: learning_rate_factor(settings, step, total))


def set_step(optimizer: Optimizer, scheduler: LambdaLR | None, steps: int) -> None:
    """Put the schedule to where it is after `steps` steps."""
    if scheduler is not None:
        scheduler.last_epoch = steps
        for group, peak, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = peak * factor(steps)


def learning_rate_factor(settings: OptimizerSettings, step: int, total_steps: int | None) -> float:
    """The share of the peak learning rate that optimizer step number `step` (from 0) uses."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant" or total_steps is None:
        return 1.0
    progress = min(1.0, (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps))
    floor = settings.final_learning_rate / settings.learning_rate
    left = 1 - progress if settings.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return floor + (1 - floor) * left


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def _require(holds: bool, name: str, what: str, value: object) -> None:
    if not holds:
        raise SettingsError(f"{name} must be {what}. Received: {value!r}")
