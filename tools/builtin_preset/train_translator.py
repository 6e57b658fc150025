"""Train the built-in translator, English to German, French and Spanish, with `Seq2SeqLM.fit`.

    python tools/builtin_preset/translation_data.py
    python tools/builtin_preset/train_translator.py --seconds 270   # one GPU; writes .data/debian_translator_en
    python tools/builtin_preset/train_translator.py --output .data/try --limit 300 --epochs 1 --layers 1 1

The target language is a token before the source, `>>de<<`, as Marian's multilingual models have it. Of the best epochs
by validation loss and by validation accuracy, and the last one, the preset is the one with the highest BLEU on
validation rows. The test split is never read here.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from noise import Epochs, NoisedPairs, mask_tokens
from train import MASK_ID, affordable, run_stage, save_candidates, train_tokenizer, write_configs

from s2s_ray import Seq2SeqLM
from s2s_ray.training.batches import Examples, Ragged

LANGUAGES = ("de", "fr", "es")
MAX_POSITIONS = 256  # a sentence rarely has more than 80 tokens; longer pairs are left out
GENERATION = {"num_beams": 4, "max_length": MAX_POSITIONS, "early_stopping": True}
SELECTION_ROWS = 1000


def marked(table: pa.Table) -> list[str]:
    """The sources right behind the token of their target language."""
    rows = zip(table.column("language").to_pylist(), table.column("source").to_pylist(), strict=True)
    return [f">>{language}<<{source}" for language, source in rows]


def tokenise(task: Seq2SeqLM, table: pa.Table, repeat: int) -> Examples:
    """The pairs as ids, those that are too long left out; Spanish descriptions, the fewest, `repeat` times."""
    preprocessor = task.preprocessor
    assert preprocessor is not None
    sources, cut = preprocessor.encode_sources(marked(table))
    labels = preprocessor.encode_targets(table.column("target").to_pylist(), MAX_POSITIONS + 1)
    rare = pc.and_(pc.equal(table.column("language"), "es"), pc.not_equal(table.column("kind"), "message"))
    times = np.where(rare.to_numpy(), repeat, 1)
    short = [not was_cut and len(row) <= MAX_POSITIONS for was_cut, row in zip(cut, labels, strict=True)]
    rows = np.repeat(np.arange(len(times)), np.where(short, times, 0)).tolist()
    print(f"{sum(short)} pairs, {len(short) - sum(short)} too long, {len(rows)} an epoch", flush=True)
    picked = (Ragged.from_rows([part[row] for row in rows]) for part in (sources, labels))
    return Examples(*picked, preprocessor.decoder_start_token_id, 1)


def train(table: pa.Table, validation: pa.Table) -> list[Path]:
    """The candidates' directories."""
    start = args.output.with_name(args.output.name + ".start")
    shutil.rmtree(start, ignore_errors=True)
    start.mkdir(parents=True)
    texts = pc.unique(table.column("source")).to_pylist() + table.column("target").to_pylist()
    tokens = [f">>{language}<<" for language in LANGUAGES]
    train_tokenizer(texts, args.vocabulary_size, start, positions=MAX_POSITIONS, more=tokens)
    write_configs(
        start,
        args.vocabulary_size,
        args.layers,
        GENERATION,
        feed_forward=args.feed_forward,
        positions=(MAX_POSITIONS, MAX_POSITIONS),
    )
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    task = Seq2SeqLM.from_preset(start, load_weights=False, device=args.device)
    print(f"{sum(p.numel() for p in task.backbone.parameters())} parameters on {args.device}", flush=True)
    noise = mask_tokens(MASK_ID, args.mask, first=2)
    examples = tokenise(task, table, args.repeat)
    pairs = Epochs(NoisedPairs(examples, noise, batch_tokens=args.batch_tokens, seed=args.seed), args.workers)
    keep = run_stage(
        task,
        pairs,
        {"encoder_text": marked(validation), "decoder_text": validation.column("target").to_pylist()},
        epochs=affordable(task, pairs, args.epochs, args.seconds),
        rate=args.rate,
        smoothing=0.1,
        decay=0.9995,
        seconds=args.seconds,
        seed=args.seed,
    )
    declare_languages(task)
    return save_candidates(task, keep, args.output)


def declare_languages(task: Seq2SeqLM) -> None:
    """What the saved preset's preprocessor knows besides the tokens: English sources, and German unless told."""
    preprocessor = task.preprocessor
    assert preprocessor is not None and preprocessor.languages is not None
    preprocessor.languages.sources = ["en"]
    preprocessor.source_lang, preprocessor.target_lang = "en", "de"


def bleu(preset: Path, rows: pa.Table, num_beams: int) -> float:
    """Corpus BLEU of the preset's translations, all languages together."""
    from sacrebleu.metrics import BLEU

    task = Seq2SeqLM.from_preset(preset, device=args.device)
    sources, targets, languages = (rows.column(name).to_pylist() for name in ("source", "target", "language"))
    translations = task.generate(sources, target_lang=languages, num_beams=num_beams)
    score = BLEU().corpus_score(translations, [targets]).score
    print(f"{preset.name}, {num_beams} beams: validation BLEU {score:.2f} on {len(rows)} rows", flush=True)
    return float(score)


def main() -> None:
    table, validation = (pq.read_table(args.data / f"{name}.parquet") for name in ("train", "validation"))
    # In random order, so that a slice is a sample.
    order = np.random.default_rng(0)
    table, validation = (part.take(order.permutation(len(part))) for part in (table, validation))
    if args.limit:
        table, validation = table.slice(0, args.limit), validation.slice(0, args.limit)
    candidates = args.choose or train(table, validation)
    rows = validation.slice(0, SELECTION_ROWS)
    best = max(candidates, key=lambda candidate: bleu(candidate, rows, 1))
    shutil.rmtree(args.output, ignore_errors=True)
    shutil.copytree(best, args.output)
    size = (args.output / "model.safetensors").stat().st_size
    score = bleu(args.output, rows, GENERATION["num_beams"])
    print(json.dumps({"preset": str(args.output), "chosen": best.name, "model_bytes": size, "validation_bleu": score}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".data/translation"))
    parser.add_argument("--output", type=Path, default=Path(".data/debian_translator_en"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vocabulary-size", type=int, default=9216)
    parser.add_argument("--layers", type=int, nargs=2, default=[6, 2], help="encoder and decoder layers")
    parser.add_argument("--feed-forward", type=int, nargs=2, default=[512, 1024], help="widths, encoder and decoder")
    parser.add_argument("--batch-tokens", type=int, default=32768)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seconds", type=float, help="fewer epochs if they would take longer than this")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--mask", type=float, default=0.05, help="share of source tokens masked")
    parser.add_argument("--repeat", type=int, default=3, help="times a Spanish description comes in an epoch")
    workers = min(10, (os.cpu_count() or 1) - 1) if torch.cuda.is_available() else 0
    parser.add_argument("--workers", type=int, default=workers, help="processes that make noised batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="use so many rows only, to try the script")
    parser.add_argument("--choose", type=Path, nargs="+", help="only choose among these candidates")
    args = parser.parse_args()
    main()
