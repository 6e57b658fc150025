"""Fine-tune any encoder-decoder preset on pairs of texts in Parquet, on any number of workers, resumably.

    python jobs/finetune.py --input data/train --output out/run --preset debian_summarizer_en \\
        --text-column description --summary-column reference --max-steps 100
    python jobs/finetune.py --input s3://bucket/train --validation-input s3://bucket/valid --output s3://bucket/run \\
        --preset hf://facebook/bart-large --num-workers 8 --epochs 3 --metrics rougeL --best-metric rougeL
    python jobs/generate.py --preset out/run/preset --input data/test --output out/answers

The same command again resumes. The result is OUTPUT/preset. Exit codes: s2s_ray/errors.py.
"""

from collections.abc import Sequence

from s2s_ray.pipelines import command


def finetune(argv: Sequence[str]) -> int:
    return command.finetune(argv, __doc__ or "")


if __name__ == "__main__":
    command.main(finetune)
