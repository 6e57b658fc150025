"""Evaluation inside training: loss over validation pairs, and metrics of what the model generates for a sample."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from s2s_ray import metrics
from s2s_ray.errors import SettingsError
from s2s_ray.seq2seq_lm import Seq2SeqLM
from s2s_ray.training.batches import BatchPlan, Examples
from s2s_ray.training.distributed import World
from s2s_ray.training.loss import CrossEntropy
from s2s_ray.training.step import Forward, Totals
from s2s_ray.training.steps import deal

LOSS = "val_loss"


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Pairs for the loss; and source texts with references for the metrics named, generated with `generation`.

    languages: `source_lang` and `target_lang` of each source, where they have any.
    """

    examples: Examples
    sources: Sequence[str] = ()
    references: Sequence[str] = ()
    metrics: tuple[str, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)
    languages: Mapping[str, Sequence[str]] = field(default_factory=dict)


def evaluate(task: Seq2SeqLM, validation: Validation, world: World, batch_tokens: int) -> dict[str, Any]:
    """`val_loss` (without label smoothing), the metrics, and `signatures` of how they were computed.

    The workers share the rows; each must hold the same `task`.
    """
    figures: dict[str, Any] = {LOSS: _loss(task, validation.examples, world, batch_tokens)}
    if not validation.metrics:
        return figures
    mine = slice(world.rank, None, world.size)
    sources = list(validation.sources[mine])
    languages: dict[str, Any] = {name: list(column[mine]) for name, column in validation.languages.items()}
    answers = task.generate(sources, **validation.generation, **languages) if sources else []
    shares = world.gather(answers)
    texts = [shares[row % world.size][row // world.size] for row in range(len(validation.sources))]
    scores = metrics.corpus_scores(validation.metrics, texts, validation.references)
    figures |= {name: score.value for name, score in scores.items()}
    return figures | {"signatures": {name: score.signature for name, score in scores.items()}}


def _loss(task: Seq2SeqLM, examples: Examples, world: World, batch_tokens: int) -> float:
    plan = BatchPlan(examples.sources.lengths, examples.labels.lengths, batch_tokens=batch_tokens, shuffle=False)
    precision: Any = "bf16" if world.device.type == "cuda" else "fp32"
    totals, forward = Totals(), Forward(task.backbone, CrossEntropy(), (), precision)
    task.backbone.eval()
    with torch.no_grad():
        for share in deal(plan.batches(), world.rank, world.size):
            if share is not None:
                forward(examples.collate(share[1]).packed().to(world.device), totals)
    loss, tokens = world.sum([float(totals.sums.get("loss", 0.0)), totals.target_weight])
    return loss / tokens


def check_metrics(best_metric: str, names: Sequence[str]) -> None:
    """Raise SettingsError unless the metrics are known and the best checkpoint is chosen by one of them."""
    for name in names:
        if name not in metrics.CORPUS_METRICS:
            raise SettingsError(f"--metrics must be of {', '.join(metrics.CORPUS_METRICS)}. Received: {name!r}")
    if best_metric not in (LOSS, *names):
        raise SettingsError(
            f"--best-metric must be {LOSS} or one of --metrics: {', '.join(names)}. Received: {best_metric!r}"
        )


def best_step(evaluations: Sequence[Mapping[str, Any]], metric: str) -> int | None:
    """The step of the first best evaluation; losses are best when small, all else when large."""
    if not evaluations:
        return None
    sign = 1 if metric == LOSS else -1
    return int(min(evaluations, key=lambda entry: sign * entry[metric])["step"])


def evaluations_since_best(evaluations: Sequence[Mapping[str, Any]], metric: str) -> int:
    """How many evaluations came after the best one."""
    best = best_step(evaluations, metric)
    return sum(entry["step"] > best for entry in evaluations) if best is not None else 0
