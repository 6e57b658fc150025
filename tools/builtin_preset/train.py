"""Train the built-in summariser on Debian's package descriptions with `Seq2SeqLM.fit`.

    python tools/builtin_preset/data.py
    python tools/builtin_preset/train.py        # one GPU: minutes; writes .data/debian_summarizer_en
    python tools/builtin_preset/train.py --output .data/try --limit 300 --pretrain-epochs 1 --epochs 1 --layers 1 1

Three stages: a byte-level BPE on the training split; denoising of the long descriptions, as BART's pretraining; then
description to synopsis. Of the best epochs by validation loss and by validation accuracy, and the last one, the
preset is the one with the highest ROUGE-L on validation rows. The test split is never read here.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from noise import Epochs, NoisedPairs, infill, mask_tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from s2s_ray import Seq2SeqLM
from s2s_ray.training.batches import Examples, Ragged
from s2s_ray.training.callbacks import Callback, WeightAverage
from s2s_ray.training.compiled import ACCURACY
from s2s_ray.training.loss import CrossEntropy
from s2s_ray.training.optimizers import OptimizerSettings

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
MASK_ID = 4
MAX_POSITIONS = 512
PRETRAIN_LENGTH = 256  # tokens of a text that are denoised
SELECTION_ROWS = 600
VALIDATION_BATCH_TOKENS = 65536


def train_tokenizer(
    texts: list[str], vocabulary_size: int, directory: Path, *, positions: int = MAX_POSITIONS, more: Sequence[str] = ()
) -> None:
    """A byte-level BPE with BART's special tokens and template, as tokenizer.json and tokenizer_config.json.

    `more` are special tokens of the model's own, from id 5 on.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[*SPECIAL_TOKENS, *more],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"}
    config: dict[str, Any] = {f"{role}_token": token for role, token in names.items()}
    config |= {"tokenizer_class": "BartTokenizer", "model_max_length": positions, "add_prefix_space": False}
    if more:
        config["additional_special_tokens"] = list(more)
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_configs(
    directory: Path,
    vocabulary_size: int,
    layers: Sequence[int],
    generation: Mapping[str, Any],
    *,
    feed_forward: Sequence[int] = (1024, 1024),
    positions: tuple[int, int] = (MAX_POSITIONS, 64),
) -> None:
    """config.json, generation_config.json and preprocessor.json of the model to be trained.

    `layers`, `feed_forward` and `positions` (longest texts, in tokens) are encoder's and decoder's.
    """
    ids = {
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    }
    config = {
        "architectures": ["BartForConditionalGeneration"],
        "model_type": "bart",
        "is_encoder_decoder": True,
        "vocab_size": vocabulary_size,
        "d_model": 256,
        "encoder_layers": layers[0],
        "decoder_layers": layers[1],
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": feed_forward[0],
        "decoder_ffn_dim": feed_forward[1],
        "max_position_embeddings": max(positions),
        "activation_function": "gelu",
        "dropout": 0.1,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "init_std": 0.05,
        "scale_embedding": False,
        "tie_word_embeddings": True,
        "use_cache": True,
        **ids,
    }
    lengths = {
        "encoder_sequence_length": positions[0],
        "decoder_sequence_length": positions[1],
        "decoder_start_token_id": 2,
    }
    for name, content in (("config", config), ("generation_config", {**ids, **generation}), ("preprocessor", lengths)):
        (directory / f"{name}.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def tokenise(task: Seq2SeqLM, table: pa.Table) -> Examples:
    """The split's pairs as ids."""
    preprocessor = task.preprocessor
    assert preprocessor is not None
    sources, cut = preprocessor.encode_sources(table.column("description").to_pylist())
    labels = preprocessor.encode_targets(table.column("reference").to_pylist())
    print(f"{len(sources)} pairs, {sum(cut)} sources cut to {preprocessor.encoder_sequence_length} tokens", flush=True)
    return Examples(Ragged.from_rows(sources), Ragged.from_rows(labels), preprocessor.decoder_start_token_id, 1)


def denoising_pairs(examples: Examples) -> Examples:
    """Each long text as its own target, cut to PRETRAIN_LENGTH tokens."""
    rows = [examples.sources[i] for i in range(len(examples))]
    cut = Ragged.from_arrays([row if len(row) <= PRETRAIN_LENGTH else row[:PRETRAIN_LENGTH] for row in rows])
    return Examples(cut, cut, examples.start, examples.pad)


class Deadline(Callback):
    """Stop after the epoch in which 1.15 x `seconds` are over, should the estimate of `affordable` have been far
    off.
    """

    def __init__(self, seconds: float | None) -> None:
        self.end = float("inf") if seconds is None else time.monotonic() + 1.15 * seconds

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        self.stop_training = time.monotonic() > self.end


class KeepBest(Callback):
    """Copies of the weights at the epochs with the best validation loss and the best validation accuracy."""

    def __init__(self) -> None:
        self.best: dict[str, tuple[float, int]] = {}
        self.weights: dict[str, dict[str, torch.Tensor]] = {}

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        for name, value in (("loss", -logs["val_loss"]), ("accuracy", logs[f"val_{ACCURACY}"])):
            if name not in self.best or value > self.best[name][0]:
                self.best[name] = (value, epoch)
                self.weights[name] = {k: v.cpu().clone() for k, v in self.task.backbone.state_dict().items()}


def optimizer(learning_rate: float, warmup_steps: int, total_steps: int) -> OptimizerSettings:
    return OptimizerSettings(
        name="adamw",
        learning_rate=learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.02,
        schedule="cosine",
        warmup_steps=min(warmup_steps, max(1, total_steps // 10)),
        total_steps=total_steps,
        final_learning_rate=learning_rate / 100,
        clip_norm=1.0,
    )


def affordable(task: Seq2SeqLM, data: Epochs, epochs: int, seconds: float | None) -> int:
    """`epochs`, or as many as fit into `seconds` by the speed of 60 steps (60 more warm up) that learn nothing."""
    if seconds is None:
        return epochs
    weights = {k: v.clone() for k, v in task.backbone.state_dict().items()}
    task.compile(optimizer=OptimizerSettings(learning_rate=1e-12), weighted_metrics=None)
    history = task.fit(data, epochs=2, steps_per_epoch=60, verbose=0, precision="fp32")
    task.backbone.load_state_dict(weights)
    epoch_seconds = data.real_tokens() / history.history["tokens_per_second"][-1]
    print(f"{history.history['tokens_per_second'][-1]:.0f} tokens/s, an epoch takes {epoch_seconds:.1f} s", flush=True)
    return max(1, min(epochs, int(seconds / epoch_seconds)))


def run_stage(
    task: Seq2SeqLM,
    data: Epochs,
    validation: Any,
    *,
    epochs: int,
    rate: float,
    smoothing: float,
    decay: float,
    seconds: float | None,
    seed: int,
) -> KeepBest:
    """One call of `fit`; the task ends with the averaged weights of the last epoch."""
    steps = epochs * len(data.data.plan.batches())
    task.compile(
        optimizer=optimizer(rate, 1000, steps),
        loss=CrossEntropy(label_smoothing=smoothing),
        weighted_metrics="accuracy",
    )
    keep = KeepBest()
    started = time.monotonic()
    task.fit(
        data,
        epochs=epochs,
        verbose=2,
        validation_data=validation,
        validation_batch_size=256,
        precision="fp32",
        callbacks=[WeightAverage(decay), keep, Deadline(seconds)],
        seed=seed,
    )
    print(f"{epochs} epochs, {steps} steps at most, {time.monotonic() - started:.0f} s; best {keep.best}", flush=True)
    return keep


def save(task: Seq2SeqLM, directory: Path) -> None:
    """As fp16, which halves the file; the task goes on in fp32."""
    task.backbone.half()
    task.save_to_preset(directory)
    task.backbone.float()


def choose(candidates: list[Path], table: pa.Table) -> Path:
    """The candidate with the highest ROUGE-L of greedy summaries on the first SELECTION_ROWS validation rows."""
    from s2s_ray.metrics import rouge

    rows = table.slice(0, SELECTION_ROWS)
    references = rows.column("reference").to_pylist()
    scores = {}
    for candidate in candidates:
        task = Seq2SeqLM.from_preset(candidate, device=args.device)
        summaries = task.generate(rows.column("description").to_pylist(), num_beams=1)
        scores[candidate] = rouge(summaries, references)["rougeL"].value
        print(f"{candidate.name}: validation ROUGE-L {scores[candidate]:.4f}", flush=True)
    return max(candidates, key=lambda c: scores[c])


def train(table: pa.Table, validation: pa.Table) -> list[Path]:
    """All three stages; the candidates' directories."""
    start = args.output.with_name(args.output.name + ".start")
    shutil.rmtree(start, ignore_errors=True)
    start.mkdir(parents=True)
    texts = table.column("description").to_pylist() + 3 * table.column("reference").to_pylist()
    train_tokenizer(texts, args.vocabulary_size, start)
    beams = {"num_beams": 4, "max_length": 40, "no_repeat_ngram_size": 3, "early_stopping": True}
    write_configs(start, args.vocabulary_size, args.layers, beams)
    torch.manual_seed(args.seed)
    # At this size a step waits for kernel launches, and bf16 autocast launches a cast for nearly every operand.
    torch.set_float32_matmul_precision("high")
    task = Seq2SeqLM.from_preset(start, load_weights=False, device=args.device)
    print(f"{sum(p.numel() for p in task.backbone.parameters())} parameters on {args.device}", flush=True)
    pairs = tokenise(task, table)
    held_out = {
        "encoder_text": validation.column("description").to_pylist(),
        "decoder_text": validation.column("reference").to_pylist(),
    }
    texts_only = {"encoder_text": held_out["encoder_text"][:500], "decoder_text": held_out["encoder_text"][:500]}
    batch = {"batch_tokens": args.batch_tokens, "seed": args.seed}
    noised = Epochs(NoisedPairs(denoising_pairs(pairs), infill(MASK_ID), **batch), args.workers)
    epochs = affordable(task, noised, args.pretrain_epochs, args.pretrain_seconds)
    if epochs:
        run_stage(
            task,
            noised,
            texts_only,
            epochs=epochs,
            rate=args.pretrain_rate,
            smoothing=0.0,
            decay=0.999,
            seconds=args.pretrain_seconds,
            seed=args.seed,
        )
    summaries = Epochs(NoisedPairs(pairs, mask_tokens(MASK_ID, args.mask), **batch), args.workers)
    epochs = affordable(task, summaries, args.epochs, args.seconds)
    keep = run_stage(
        task,
        summaries,
        held_out,
        epochs=epochs,
        rate=args.rate,
        smoothing=0.1,
        decay=0.9995,
        seconds=args.seconds,
        seed=args.seed,
    )
    return save_candidates(task, keep, args.output)


def save_candidates(task: Seq2SeqLM, keep: KeepBest, output: Path) -> list[Path]:
    """The last weights and the kept ones as fp16 presets beside `output`."""
    paths = []
    for name, weights in {"last": task.backbone.state_dict(), **keep.weights}.items():
        task.backbone.load_state_dict({k: v.float() for k, v in weights.items()})
        paths.append(output.with_name(f"{output.name}.{name}"))
        save(task, paths[-1])
    return paths


def main() -> None:
    folder = args.data
    table = pq.read_table(folder / "train.parquet", columns=["description", "reference"])
    validation = pq.read_table(folder / "validation.parquet", columns=["description", "reference"])
    # Rows are stored in hash order of their groups: a slice is a random sample.
    if args.limit:
        table, validation = table.slice(0, args.limit), validation.slice(0, args.limit)
    candidates = args.choose or train(table, validation)
    if args.stop_before_choice:
        return
    best = choose(candidates, validation)
    shutil.rmtree(args.output, ignore_errors=True)
    shutil.copytree(best, args.output)
    size = (args.output / "model.safetensors").stat().st_size
    print(json.dumps({"preset": str(args.output), "chosen": best.name, "model_bytes": size}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".data/descriptions"))
    parser.add_argument("--output", type=Path, default=Path(".data/debian_summarizer_en"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vocabulary-size", type=int, default=8192)
    parser.add_argument("--layers", type=int, nargs=2, default=[4, 2], help="encoder and decoder layers")
    parser.add_argument("--batch-tokens", type=int, default=32768)
    parser.add_argument("--pretrain-epochs", type=int, default=12)
    parser.add_argument("--pretrain-seconds", type=float, help="fewer epochs if they would take longer than this")
    parser.add_argument("--pretrain-rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seconds", type=float, help="fewer epochs if they would take longer than this")
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--mask", type=float, default=0.1, help="share of source tokens masked while fine-tuning")
    workers = min(10, (os.cpu_count() or 1) - 1) if torch.cuda.is_available() else 0
    parser.add_argument("--workers", type=int, default=workers, help="processes that make noised batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="use the first rows only, to try the script")
    parser.add_argument("--stop-before-choice", action="store_true")
    parser.add_argument("--choose", type=Path, nargs="+", help="only choose among these candidates")
    args = parser.parse_args()
    main()
