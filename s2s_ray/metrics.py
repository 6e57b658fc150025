"""Quality of generated text: ROUGE, BLEU and chrF with their usual implementations, and perplexity.

ROUGE is google-research's `rouge-score`, BLEU and chrF are `sacrebleu`; both come with the extra `eval`.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s2s_ray.errors import InputError, SettingsError

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
CORPUS_METRICS = (*ROUGE_TYPES, "rougeLsum", "bleu", "chrf")


@dataclass(frozen=True, slots=True)
class Score:
    """A corpus score with the interval [low, high] that holds `confidence` of its bootstrap resamples.

    `signature` says how it was computed, so that figures can be compared.
    """

    value: float
    low: float
    high: float
    signature: str
    confidence: float = 0.95

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def rouge(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    types: Sequence[str] = ROUGE_TYPES,
    use_stemmer: bool = True,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Score]:
    """Mean F1 of each ROUGE type, from 0 to 1, with 95% bootstrap intervals over the rows.

    types: as rouge-score's, e.g. "rouge1", "rougeL", "rougeLsum". Raises InputError when the lists do not pair up,
    SettingsError when the extra `eval` is missing or a type is unknown.
    """
    rows = rouge_rows(predictions, references, types=types, use_stemmer=use_stemmer)
    version = importlib.import_module("importlib.metadata").version("rouge-score")
    stem = "stem" if use_stemmer else "nostem"
    return {
        name: bootstrap(values, resamples, seed, f"{name}|F1|{stem}|rouge-score:{version}|bs:{resamples}|rs:{seed}")
        for name, values in rows.items()
    }


def rouge_rows(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    types: Sequence[str] = ROUGE_TYPES,
    use_stemmer: bool = True,
) -> dict[str, NDArray[np.float64]]:
    """F1 of every row, float64 `[rows]` for each type."""
    _check_pairs(predictions, references)
    scorers = _extra("rouge_score.rouge_scorer")
    known = {f"rouge{n}" for n in (*range(1, 10), "L", "Lsum")}
    for name in types:
        if name not in known:
            raise SettingsError(f"types must be of {', '.join(sorted(known))}. Received: {name!r}")
    scorer = scorers.RougeScorer(list(types), use_stemmer=use_stemmer)
    scored = [scorer.score(reference, text) for text, reference in zip(predictions, references, strict=True)]
    return {name: np.array([row[name].fmeasure for row in scored]) for name in types}


def bootstrap(values: NDArray[np.float64], resamples: int = 1000, seed: int = 0, signature: str = "mean") -> Score:
    """The mean of `values` with the 95% percentile interval of the means of `resamples` draws with replacement."""
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Score(float(values.mean()), float(low), float(high), signature)


def bleu(
    predictions: Sequence[str], references: Sequence[str], *, tokenize: str = "13a", resamples: int = 1000
) -> Score:
    """Corpus BLEU, from 0 to 100, by sacrebleu with its signature and bootstrap interval."""
    return _sacrebleu("BLEU", predictions, references, resamples, tokenize=tokenize)


def chrf(predictions: Sequence[str], references: Sequence[str], *, word_order: int = 0, resamples: int = 1000) -> Score:
    """Corpus chrF (chrF++ with word_order=2), from 0 to 100, by sacrebleu with its signature and bootstrap interval."""
    return _sacrebleu("CHRF", predictions, references, resamples, word_order=word_order)


def corpus_scores(names: Sequence[str], predictions: Sequence[str], references: Sequence[str]) -> dict[str, Score]:
    """Each metric by its name in CORPUS_METRICS: ROUGE as `rouge`, from 0 to 1; "bleu" and "chrf" from 0 to 100."""
    unknown = [name for name in names if name not in CORPUS_METRICS]
    if unknown:
        raise SettingsError(f"a metric must be one of {', '.join(CORPUS_METRICS)}. Received: {unknown[0]!r}")
    types = [name for name in names if name.startswith("rouge")]
    scores = rouge(predictions, references, types=types) if types else {}
    scores |= {name: (bleu if name == "bleu" else chrf)(predictions, references) for name in names if name not in types}
    return {name: scores[name] for name in names}


def perplexity(task: Any, x: Any, *, batch_size: int | None = None, batch_tokens: int | None = None) -> float:
    """exp of the mean negative log-likelihood of the real target tokens; `x` as in `Seq2SeqLM.fit`."""
    from s2s_ray.training.compiled import PERPLEXITY
    from s2s_ray.training.fit import evaluate

    kept = task.weighted_metrics
    task.weighted_metrics = PERPLEXITY
    try:
        return evaluate(task, x, batch_size=batch_size, batch_tokens=batch_tokens)[PERPLEXITY]
    finally:
        task.weighted_metrics = kept


def _sacrebleu(
    metric: str, predictions: Sequence[str], references: Sequence[str], resamples: int, **options: Any
) -> Score:
    _check_pairs(predictions, references)
    scorer = getattr(_extra("sacrebleu.metrics"), metric)(**options)
    result = scorer.corpus_score(list(predictions), [list(references)], n_bootstrap=resamples)
    return Score(
        float(result.score),
        float(result._mean - result._ci),
        float(result._mean + result._ci),
        str(scorer.get_signature()),
    )


def _check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    if isinstance(predictions, str) or isinstance(references, str) or len(predictions) != len(references):
        sizes = [type(v).__name__ if isinstance(v, str) else len(v) for v in (predictions, references)]
        raise InputError(f"predictions and references must be lists of one length. Received: {sizes[0]} and {sizes[1]}")
    if not predictions:
        raise InputError("predictions must hold at least one row. Received: none")


def _extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"this metric needs the package {module.split('.')[0]}: pip install 's2s_ray[eval]' ({error})"
        ) from error
