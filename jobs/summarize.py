"""Summarise a text column of a Parquet dataset, exactly once and resumably.

    python jobs/summarize.py                                  # the sample that ships, built-in model, ./out/summaries
    python jobs/summarize.py --input data/ --output out/ --text-column article --num-beams 4
    python jobs/summarize.py --input s3://bucket/in --output s3://bucket/out --preset hf://facebook/bart-large-cnn
    ray job submit --working-dir . -- python jobs/summarize.py --input s3://bucket/in --output s3://bucket/out

The same command again resumes. Exit codes: s2s_ray/errors.py.
"""

from collections.abc import Sequence

from s2s_ray.pipelines import command


def summarize(argv: Sequence[str]) -> int:
    return command.generate(argv, __doc__ or "", command.summarize_defaults(argv))


if __name__ == "__main__":
    command.main(summarize)
