"""Generate text from a text column of a Parquet dataset with any encoder-decoder preset.

    python jobs/generate.py --input data/ --output out/ --preset ./my_preset --summary-column answer
    python jobs/generate.py --input 's3://bucket/in/*.parquet' --output s3://bucket/out --preset summarizer@3 \\
        --sampler top_p --top-p 0.9 --seed 7 --num-replicas 1:8
    python jobs/generate.py --config job.toml --dry-run

The same command again resumes. Exit codes: s2s_ray/errors.py.
"""

from collections.abc import Sequence

from s2s_ray.pipelines import command


def generate(argv: Sequence[str]) -> int:
    return command.generate(argv, __doc__ or "", {})


if __name__ == "__main__":
    command.main(generate)
