"""What `compile` takes for training, checked at once rather than at the first step."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from s2s_ray.errors import SettingsError
from s2s_ray.training.loss import CrossEntropy, check_loss
from s2s_ray.training.optimizers import OptimizerLike, OptimizerSettings, check_optimizer

ACCURACY = "sparse_categorical_accuracy"  # Keras' name for the share of tokens whose arg-max is the label
PERPLEXITY = "perplexity"
_METRIC_NAMES = {
    ACCURACY: ACCURACY,
    "accuracy": ACCURACY,
    PERPLEXITY: PERPLEXITY,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSetup:
    """Optimizer, loss and metrics of a compiled task. Metrics count real target tokens only."""

    optimizer: OptimizerLike = field(default_factory=OptimizerSettings)
    loss: CrossEntropy = field(default_factory=CrossEntropy)
    weighted_metrics: tuple[str, ...] = (ACCURACY,)


def check_compiled(
    optimizer: object = "auto", loss: object = "auto", weighted_metrics: str | Sequence[str] | None = "auto"
) -> TrainingSetup:
    """What `compile` was given, checked. Raises SettingsError for the first unknown name, listing the known ones."""
    return TrainingSetup(
        optimizer=check_optimizer(optimizer),
        loss=check_loss(loss),
        weighted_metrics=_check_metrics(weighted_metrics),
    )


def _check_metrics(metrics: str | Sequence[str] | None) -> tuple[str, ...]:
    if metrics == "auto":
        return (ACCURACY,)
    names = (metrics,) if isinstance(metrics, str) else tuple(metrics or ())
    for name in names:
        if not isinstance(name, str) or name not in _METRIC_NAMES:
            raise SettingsError(f"weighted_metrics must be of {', '.join(_METRIC_NAMES)}. Received: {name!r}")
    return tuple(dict.fromkeys(_METRIC_NAMES[name] for name in names))
