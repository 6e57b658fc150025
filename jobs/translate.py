"""Translate a text column of a Parquet dataset, sentence by sentence, exactly once and resumably.

    python jobs/translate.py                                  # the sample that ships to German, ./out/translations
    python jobs/translate.py --input data/ --output out/ --target-lang fr --on-long split
    python jobs/translate.py --input s3://bucket/in --output s3://bucket/out --source-lang-column language \\
        --target-lang deu_Latn --preset hf://facebook/nllb-200-distilled-600M
    ray job submit --working-dir . -- python jobs/translate.py --input s3://bucket/in --output s3://bucket/out

The same command again resumes. Exit codes: s2s_ray/errors.py.
"""

from collections.abc import Sequence

from s2s_ray.pipelines import command


def translate(argv: Sequence[str]) -> int:
    return command.generate(argv, __doc__ or "", command.translate_defaults(argv))


if __name__ == "__main__":
    command.main(translate)
