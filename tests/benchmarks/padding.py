"""How much of a training batch would be padding, on real pairs of texts.

    python tools/builtin_preset/data.py
    python -m tests.benchmarks.padding --input .data/descriptions/train.parquet --preset debian_summarizer_en \\
        --text-column description --summary-column reference

Tokenises the pairs and cuts one epoch into batches as jobs/finetune.py does, for each budget. The layers compute on
real tokens alone; the share is what bounds a batch and what embedding and, on a CPU, attention still see.
"""

import argparse
import json

import numpy as np

from s2s_ray import Seq2SeqLM
from s2s_ray.training.batches import BatchPlan
from s2s_ray.training.inputs import DataSettings, InMemory, open_data


def padding_share(sources: np.ndarray, targets: np.ndarray, batches: list[np.ndarray]) -> float:
    """Of all tokens, source and target together, when every batch's sides are as wide as their longest row."""
    padded = sum(len(rows) * (int(sources[rows].max()) + int(targets[rows].max())) for rows in batches)
    return 1 - float(sources.sum() + targets.sum()) / padded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True)
    parser.add_argument("--preset", default="debian_summarizer_en")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--summary-column", default="summary")
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=[4_096, 16_384, 32_768])
    args = parser.parse_args()
    settings = DataSettings(text_column=args.text_column, summary_column=args.summary_column)
    data = open_data(args.input, None, None, Seq2SeqLM.from_preset(args.preset).preprocessor, settings)
    assert isinstance(data, InMemory)
    sources, targets = data.examples.sources.lengths, data.examples.labels.lengths
    shuffled = BatchPlan(sources, targets, 32).batches()
    result = {
        "rows": len(sources),
        "source_mean": sources.mean(),
        "source_max": int(sources.max()),
        "target_mean": targets.mean(),
        "random_batches_of_32": padding_share(sources, targets, shuffled),
    }
    for tokens in args.batch_tokens:
        batches = BatchPlan(sources, targets, batch_tokens=tokens).batches()
        result[f"batch_tokens_{tokens}"] = padding_share(sources, targets, batches)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
