"""Generate for Parquet data that has references, and score the texts: ROUGE, BLEU or chrF with signatures, as JSON.

    python jobs/evaluate.py --input data/test --output out/evaluation --preset out/run/preset \\
        --text-column description --reference-column reference
    python jobs/evaluate.py --input s3://bucket/test --output s3://bucket/evaluation --preset translator@3 \\
        --target-lang de --reference-column german --metrics bleu chrf --num-beams 4

The same command again resumes. Exit codes: s2s_ray/errors.py.
"""

from collections.abc import Sequence

from s2s_ray.pipelines import command


def evaluate(argv: Sequence[str]) -> int:
    return command.evaluate(argv, __doc__ or "")


if __name__ == "__main__":
    command.main(evaluate)
