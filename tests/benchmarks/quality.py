"""What a smaller dtype or int8 changes in what the built-in presets write, beside fp32, on the samples that ship.

    python -m tests.benchmarks.quality                                     # bfloat16 and int8, 300 rows each
    python -m tests.benchmarks.quality --modes int8 --limit 100 --presets debian_translator_en

The samples are held out: rows of the presets' test splits. Each row is answered by the preset's own settings; the
translator takes whole descriptions sentence by sentence, as jobs/translate.py does.

steps   share of decoding steps that choose fp32's token when fed fp32's own answer (no beams, no constraints)
alike   share of rows whose answer is the same string
ROUGE-L, BLEU    of fp32 and of the mode against the references, and the difference with the 95% interval of a paired
        bootstrap over rows (1,000 resamples)

Prints a table and one JSON line. Needs the extra `eval`.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from sacrebleu.metrics import BLEU

from s2s_ray import Seq2SeqLM
from s2s_ray.generation.cache import DecoderCache
from s2s_ray.metrics import rouge_rows
from s2s_ray.text.segment import segment
from tests.models.contract import padded

SAMPLES = Path(__file__).parents[2] / "s2s_ray" / "samples"
ROWS, RESAMPLES = 16, 1000
MODES: dict[str, dict[str, Any]] = {"bfloat16": {"dtype": "bfloat16"}, "int8": {"quantization": "int8"}}
Metric = Callable[[Sequence[str], Sequence[str]], tuple[Any, Callable[[Any], float]]]


class Work(NamedTuple):
    """Texts for the model, references, and how the answers to texts become one answer for each reference."""

    texts: list[str]
    references: list[str]
    join: Callable[[list[str]], list[str]]
    options: dict[str, Any]


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> tuple[Any, Callable[[Any], float]]:
    """(a row of numbers for each answer, what makes the score of some of these rows)."""
    return rouge_rows(answers, references, types=["rougeL"])["rougeL"][:, None], lambda rows: 100 * float(rows.mean())


def bleu(answers: Sequence[str], references: Sequence[str]) -> tuple[Any, Callable[[Any], float]]:
    """As `rouge_l`, from sacrebleu's own counts of each row."""
    metric = BLEU()
    counts = metric._extract_corpus_statistics(list(answers), [list(references)])

    def score(rows: Any) -> float:
        return float(metric._compute_score_from_stats(rows.sum(axis=0).tolist()).score)

    return np.array(counts), score


def summaries(limit: int) -> Work:
    """Descriptions with their synopses, spread over the sample."""
    rows = _spread(_sample("package_descriptions"), limit)
    return Work([row["description"] for row in rows], [row["reference"] for row in rows], lambda answers: answers, {})


def translations(limit: int) -> Work:
    """Descriptions with their translations to German, French and Spanish."""
    rows = _sample("package_translations")
    pairs = [(row["description"], lang, row[lang]) for row in rows for lang in ("de", "fr", "es") if row[lang]]
    pairs = _spread(pairs, limit)
    cut = [segment(text) for text, _, _ in pairs]
    texts = [" ".join(sentence.split()) for segments in cut for sentence in segments.sentences]
    languages = [lang for (_, lang, _), segments in zip(pairs, cut, strict=True) for _ in segments.sentences]

    def join(answers: list[str]) -> list[str]:
        left = iter(answers)
        return [segments.join([next(left).strip() for _ in segments.sentences]) for segments in cut]

    return Work(texts, [reference for _, _, reference in pairs], join, {"target_lang": languages})


PRESETS: dict[str, tuple[str, Callable[[int], Work], Metric]] = {
    "debian_summarizer_en": ("ROUGE-L", summaries, rouge_l),
    "debian_translator_en": ("BLEU", translations, bleu),
}


def _sample(name: str) -> list[dict[str, Any]]:
    return [row for path in sorted((SAMPLES / name).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def _spread(rows: list[Any], limit: int) -> list[Any]:
    return [rows[i * len(rows) // limit] for i in range(min(limit, len(rows)))] if limit < len(rows) else rows


@torch.inference_mode()
def chosen(task: Seq2SeqLM, work: Work, answers: Sequence[str]) -> list[list[int]]:
    """The token that each step prefers when the decoder is fed an answer, row by row, as generation runs its steps."""
    assert task.preprocessor is not None
    routes = task.preprocessor.routes(len(work.texts), **work.options)
    sources, _ = task.preprocessor.encode_sources(work.texts, routes=routes)
    fed = [
        [start, *labels[:-1]]
        for start, labels in zip(
            task.preprocessor.decoder_starts(routes),
            task.preprocessor.encode_targets(answers, routes=routes),
            strict=True,
        )
    ]
    task.backbone.pack()
    order = sorted(range(len(fed)), key=lambda row: len(fed[row]))
    result: list[list[int]] = [[]] * len(fed)
    for start in range(0, len(order), ROWS):
        batch = order[start : start + ROWS]
        ids, mask = padded([sources[row] for row in batch], task.preprocessor.tokenizer.pad_token_id)
        cache = DecoderCache([task.backbone.init_cache(task.backbone.encode(ids, mask), mask)])
        tokens, real = padded([fed[row] for row in batch], task.preprocessor.tokenizer.pad_token_id)
        best = torch.stack([task.backbone.decode(column, cache).argmax(dim=-1) for column in tokens.T], dim=1)
        for row, values, keep in zip(batch, best, real, strict=True):
            result[row] = values[keep].tolist()
    return result


def compare(name: str, modes: Sequence[str], limit: int) -> list[dict[str, Any]]:
    """One dictionary of figures for each mode."""
    metric_name, make, metric = PRESETS[name]
    work = make(limit)
    exact = Seq2SeqLM.from_preset(name)
    answers = exact.generate(work.texts, **work.options)
    steps = chosen(exact, work, answers)
    texts = work.join(answers)
    counts, score = metric(texts, work.references)
    results = []
    for mode in modes:
        task = Seq2SeqLM.from_preset(name, **MODES[mode])
        others = task.generate(work.texts, **work.options)
        pairs = [
            (a, b) for x, y in zip(steps, chosen(task, work, answers), strict=True) for a, b in zip(x, y, strict=True)
        ]
        other_texts = work.join(others)
        other_counts, _ = metric(other_texts, work.references)
        low, high = _interval(counts, other_counts, score)
        results.append(
            {
                "preset": name,
                "mode": mode,
                "rows": len(texts),
                "steps": len(pairs),
                "steps_equal": sum(a == b for a, b in pairs) / len(pairs),
                "rows_alike": sum(a == b for a, b in zip(texts, other_texts, strict=True)) / len(texts),
                "metric": metric_name,
                "fp32": score(counts),
                "score": score(other_counts),
                "difference_low": low,
                "difference_high": high,
            }
        )
        r = results[-1]
        difference = f"{r['score'] - r['fp32']:+.2f} [{low:+.2f}, {high:+.2f}]"
        shares = f"{r['steps_equal']:.2%} of {r['steps']} | {r['rows_alike']:.1%} of {r['rows']}"
        print(f"| {name} | {mode} | {shares} | {metric_name} {r['fp32']:.2f} | {difference} |", flush=True)
    return results


def _interval(counts: Any, others: Any, score: Callable[[Any], float]) -> tuple[float, float]:
    generator = np.random.default_rng(0)
    draws = [generator.integers(0, len(counts), len(counts)) for _ in range(RESAMPLES)]
    low, high = np.percentile([score(others[draw]) - score(counts[draw]) for draw in draws], [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--limit", type=int, default=300, help="rows of each preset (default 300)")
    arguments = parser.parse_args()
    print("| preset | mode | steps | alike | fp32 | difference |\n|---|---|---|---|---|---|", flush=True)
    results = [figures for name in arguments.presets for figures in compare(name, arguments.modes, arguments.limit)]
    print(json.dumps({"torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
