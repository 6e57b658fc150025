"""BLEU and chrF of a translator on the test split of translation_data.py, beside the source left as it is.

    python tools/builtin_preset/translation_data.py
    python tools/builtin_preset/evaluate_translator.py                    # the built-in preset, its own settings
    python tools/builtin_preset/evaluate_translator.py --num-beams 1 --limit 200
    python tools/builtin_preset/evaluate_translator.py --documents        # whole descriptions, cut as the job does

Rows are sentences and synopses; paragraphs, which are made of the same sentences, are left out. Prints a table with
sacrebleu's 95% bootstrap intervals and signatures, and one JSON line. Needs the extra `eval`.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from s2s_ray import Seq2SeqLM
from s2s_ray.metrics import Score, bleu, chrf
from s2s_ray.text.segment import segment

LANGUAGES = ("de", "fr", "es")


def read(folder: Path, language: str, documents: bool, limit: int | None) -> tuple[list[str], list[str]]:
    """Sources and references; `limit` takes rows spread evenly over the data."""
    rows = pq.read_table(folder / ("documents.parquet" if documents else "test.parquet")).to_pylist()
    if documents:
        pairs = [(row["description"], row[language]) for row in rows if row[language] is not None]
    else:
        kinds = ("sentence", "synopsis")
        pairs = [(r["source"], r["target"]) for r in rows if r["language"] == language and r["kind"] in kinds]
    if limit is not None and limit < len(pairs):
        pairs = [pairs[i * len(pairs) // limit] for i in range(limit)]
    return [source for source, _ in pairs], [target for _, target in pairs]


def translate_documents(task: Seq2SeqLM, texts: list[str], language: str, **options: Any) -> list[str]:
    """Sentence by sentence, as jobs/translate.py does."""
    cut = [segment(text) for text in texts]
    sentences = [" ".join(sentence.split()) for segments in cut for sentence in segments.sentences]
    translated = iter(task.generate(sentences, target_lang=language, **options))
    return [segments.join([next(translated).strip() for _ in segments.sentences]) for segments in cut]


def scores(texts: list[str], references: list[str]) -> dict[str, Score]:
    return {"BLEU": bleu(texts, references), "chrF": chrf(texts, references)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="debian_translator_en")
    parser.add_argument("--data", type=Path, default=Path(".data/translation"))
    parser.add_argument("--documents", action="store_true", help="whole descriptions in place of sentences")
    parser.add_argument("--languages", nargs="+", default=list(LANGUAGES))
    parser.add_argument("--num-beams", type=int, help="default: the preset's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=int, help="rows per language, spread over the data")
    args = parser.parse_args()
    task = Seq2SeqLM.from_preset(args.preset, device=args.device)
    options = {} if args.num_beams is None else {"num_beams": args.num_beams}
    report: dict[str, Any] = {}
    print("| to | rows | system | BLEU | chrF |\n|---|---|---|---|---|", flush=True)
    for language in args.languages:
        sources, references = read(args.data, language, args.documents, args.limit)
        started = time.monotonic()
        if args.documents:
            translations = translate_documents(task, sources, language, **options)
        else:
            translations = task.generate(sources, target_lang=language, **options)
        report[f"{language} seconds"] = round(time.monotonic() - started, 1)
        for system, texts in ((args.preset, translations), ("source as it is", sources)):
            found = scores(texts, references)
            cells = " | ".join(f"{s.value:.1f} [{s.low:.1f}, {s.high:.1f}]" for s in found.values())
            print(f"| {language} | {len(sources)} | {system} | {cells} |", flush=True)
            report[f"{language} {system}"] = {name: [s.value, s.low, s.high] for name, s in found.items()}
            report["signatures"] = {name: s.signature for name, s in found.items()}
    print(json.dumps({"num_beams": args.num_beams, "documents": args.documents, **report}))


if __name__ == "__main__":
    main()
