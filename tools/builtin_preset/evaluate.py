"""ROUGE of a summariser on the shipped sample (the test split of data.py), beside the first words of the text.

    python tools/builtin_preset/evaluate.py                                   # the built-in preset, its own settings
    python tools/builtin_preset/evaluate.py --num-beams 1 --limit 500         # quicker
    python tools/builtin_preset/evaluate.py --tune .data/descriptions/validation.parquet --limit 1

Prints a table with 95% bootstrap intervals over the rows, and one JSON line. Needs the extra `eval`.
"""

import argparse
import json
import time
from pathlib import Path

import pyarrow.dataset as ds

from s2s_ray import Seq2SeqLM
from s2s_ray.metrics import Score, bootstrap, rouge, rouge_rows

SAMPLE = Path(__file__).parents[2] / "s2s_ray" / "samples" / "package_descriptions"
LEAD_WORDS = 10  # the best ROUGE-L on the 2,300 validation rows, of 4 to 24 words (--tune)


def lead(text: str, words: int) -> str:
    """The baseline: the text's first words."""
    return " ".join(text.split()[:words])


def read(path: Path, limit: int | None) -> tuple[list[str], list[str]]:
    """Descriptions and references; `limit` takes rows spread evenly over the data."""
    table = ds.dataset(path, format="parquet", exclude_invalid_files=True).to_table(["description", "reference"])
    if limit is not None and limit < len(table):
        table = table.take([i * len(table) // limit for i in range(limit)])
    return table.column("description").to_pylist(), table.column("reference").to_pylist()


def tune_lead(path: Path) -> int:
    """The number of words with the highest mean ROUGE-L on the validation split."""
    texts, references = read(path, None)
    scores = {}
    for words in range(4, 25, 2):
        rows = rouge_rows([lead(text, words) for text in texts], references, types=["rougeL"])
        scores[words] = float(rows["rougeL"].mean())
        print(f"first {words} words: validation ROUGE-L {scores[words]:.4f}", flush=True)
    return max(scores, key=lambda words: scores[words])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="debian_summarizer_en")
    parser.add_argument("--data", type=Path, default=SAMPLE)
    parser.add_argument("--num-beams", type=int, help="default: the preset's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=int, help="rows to evaluate, spread over the data")
    parser.add_argument("--tune", type=Path, help="validation Parquet file to choose the baseline's length on")
    args = parser.parse_args()
    words = tune_lead(args.tune) if args.tune else LEAD_WORDS
    texts, references = read(args.data, args.limit)
    task = Seq2SeqLM.from_preset(args.preset, device=args.device)
    options = {} if args.num_beams is None else {"num_beams": args.num_beams}
    started = time.monotonic()
    summaries = task.generate(texts, **options)
    seconds = time.monotonic() - started
    baseline = [lead(text, words) for text in texts]
    results = {args.preset: rouge(summaries, references), f"first {words} words": rouge(baseline, references)}
    gains = paired_gains(summaries, baseline, references)
    names = list(gains)
    print(f"{len(texts)} rows, generated in {seconds:.0f} s on {args.device}")
    print("| | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for system, scores in [*results.items(), ("difference, paired", gains)]:
        print(f"| {system} | " + " | ".join(str(scores[name]) for name in names) + " |")
    report = {
        system: {name: [score.value, score.low, score.high] for name, score in scores.items()}
        for system, scores in [*results.items(), ("difference", gains)]
    }
    signature = results[args.preset]["rougeL"].signature
    print(json.dumps({"rows": len(texts), "seconds": round(seconds, 1), "signature": signature, **report}))


def paired_gains(ours: list[str], baseline: list[str], references: list[str]) -> dict[str, Score]:
    """Mean difference of each ROUGE type with its bootstrap interval, row by row."""
    high, low = rouge_rows(ours, references), rouge_rows(baseline, references)
    return {name: bootstrap(high[name] - low[name]) for name in high}


if __name__ == "__main__":
    main()
