"""What a fine-tuning job can be told: one frozen dataclass, from which the flags and the TOML file's keys are made."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any

from s2s_ray.errors import SettingsError
from s2s_ray.pipelines import flags
from s2s_ray.pipelines.flags import check_types, require, setting

OPTIMIZERS = ("adamw", "adam", "adafactor", "sgd")
SCHEDULES = ("linear", "cosine", "constant")
METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf")


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """All settings of a fine-tuning job. None means the preset's own value. Raises SettingsError when out of range."""

    input: tuple[str, ...] = setting(
        MISSING, "Parquet files, folders or globs with pairs of texts; several are mixed, see --input-weights", tuple
    )
    output: str = setting(MISSING, "directory to write; a rerun with the same settings resumes", identity=False)
    preset: str = setting(MISSING, "what to start from: built-in name, directory, hf://org/name@revision, store, URL")
    new_tokens: tuple[str, ...] | None = setting(
        None, "special tokens to add to the preset before training; one such as '>>gl<<' is a new language", tuple
    )
    validation_input: tuple[str, ...] | None = setting(
        None, "Parquet pairs to evaluate on at --evaluate-every and at the end", tuple
    )
    text_column: str = setting("text", "column with the source text (string, or binary read as UTF-8)")
    summary_column: str = setting("summary", "column with the target text")
    source_prefix: str | None = setting(None, "text put before every source, such as T5's 'summarize: '")
    source_lang: str | None = setting(None, "language of the sources, where the preset has languages")
    target_lang: str | None = setting(None, "language of the targets")
    source_lang_column: str | None = setting(None, "column with each pair's source language, for several in one input")
    target_lang_column: str | None = setting(None, "column with each pair's target language")
    max_source_length: int | None = setting(
        None, "longest source, special tokens included; longer ones are cut and counted", int, unit="tokens"
    )
    max_target_length: int | None = setting(
        None, "longest target, special tokens included; longer ones are cut and counted", int, unit="tokens"
    )
    max_error_rate: float = setting(0.01, "share of pairs that may be unusable before the job stops", float)
    input_weights: tuple[str, ...] | None = setting(
        None, "how often each --input is seen, one number above 0 an input; by default by size", tuple
    )
    mix_temperature: float = setting(
        1.0, "without --input-weights, weights are size ** (1 / temperature): above 1 small inputs are seen more", float
    )
    epochs: int | None = setting(None, "passes over the data; 1 unless --max-steps is given", int)
    max_steps: int | None = setting(None, "most optimizer steps", int, unit="steps")
    batch_tokens: int = setting(
        65_536, "padded tokens, source and target, of one step over all workers", int, unit="tokens"
    )
    micro_batch_tokens: int = setting(
        16_384, "padded tokens of one forward pass on one worker; more workers need fewer passes a step", int,
        unit="tokens",
    )  # fmt: skip
    optimizer: str = setting("adamw", "how gradients become updates", choices=OPTIMIZERS)
    learning_rate: float = setting(2e-5, "the peak of the schedule", float)
    schedule: str = setting("linear", "from the peak at the end of warm-up to --final-learning-rate", choices=SCHEDULES)
    warmup_steps: int = setting(0, "steps in which the learning rate rises to its peak", int, unit="steps")
    final_learning_rate: float = setting(0.0, "where linear and cosine end", float)
    weight_decay: float = setting(0.01, "decoupled (adamw) and not on biases and norms", float)
    clip_norm: float | None = setting(1.0, "bound of the gradients' global norm; 0 is off", float)
    label_smoothing: float = setting(0.0, "share of the target's probability spread over the vocabulary", float)
    dropout: float | None = setting(None, "dropout of embeddings and blocks, from 0 to 1", float)
    average_decay: float | None = setting(
        None, "evaluate and save a moving average of the weights with this decay, such as 0.999", float
    )
    lora_rank: int | None = setting(None, "train LoRA matrices of this rank in place of the weights", int)
    lora_alpha: float = setting(16.0, "LoRA's products are scaled by alpha / rank", float)
    lora_dropout: float = setting(0.0, "dropout of the input of LoRA's products, from 0 to 1", float)
    lora_targets: tuple[str, ...] = setting(
        ("query", "value"), "linear layers to put LoRA beside, by the last part of their names", tuple
    )
    seed: int = setting(0, "decides order and dropout, whatever the number of workers", int)
    precision: str = setting(
        "auto", "of the forward pass; weights stay fp32. auto: bf16 on GPUs", choices=("auto", "fp32", "bf16")
    )
    compile_layers: bool = setting(
        False, "compile the layers (torch.compile) before the first step, which takes minutes", bool, identity=False
    )
    recompute_activations: bool = setting(
        False, "keep only the layers' inputs for the backward pass: less memory, more work", bool, identity=False
    )
    strategy: str = setting(
        "ddp", "ddp: a whole model per worker; fsdp: weights, gradients and optimizer sharded over the workers",
        choices=("ddp", "fsdp"), identity=False,
    )  # fmt: skip
    log_every: int = setting(50, "steps from one line of figures to the next", int, unit="steps", identity=False)
    log_to: tuple[str, ...] | None = setting(
        None, "also send the figures to tensorboard (OUTPUT/tensorboard), wandb or mlflow", tuple, identity=False
    )
    checkpoint_every: int = setting(500, "steps from one checkpoint to the next", int, unit="steps", identity=False)
    evaluate_every: int | None = setting(
        None, "steps from one evaluation to the next; by default with every checkpoint", int, unit="steps"
    )
    evaluate_rows: int = setting(200, "validation rows to generate for --metrics", int, unit="rows")
    metrics: tuple[str, ...] | None = setting(None, f"of generated text: {', '.join(METRICS)}", tuple)
    best_metric: str = setting("val_loss", "which figure decides what the best checkpoint is, and so the preset")
    patience: int | None = setting(None, "stop after this many evaluations without a better one", int)
    num_beams: int | None = setting(None, "beams of the generation in evaluations", int)
    num_workers: str = setting("1", "workers: N, or MIN:MAX to take what the cluster has (elastic)", identity=False)
    cpus_per_worker: float = setting(1.0, "CPUs reserved per worker", float, unit="CPUs", identity=False)
    device: str | None = setting(
        None, "cpu or cuda; by default a GPU per worker where there are GPUs", choices=("cpu", "cuda"), identity=False
    )
    max_failures: int = setting(3, "lost workers to survive before the job gives up", int, identity=False)
    publish: str | None = setting(
        None, "also publish the preset: STORE/NAME, a store's path or URL and a name in it", identity=False
    )
    dry_run: bool = setting(False, "say what would be trained and stop; nothing is written", bool, identity=False)
    address: str | None = setting(
        None, "Ray cluster to use; by default RAY_ADDRESS, else a Ray of its own on this machine", identity=False
    )

    def __post_init__(self) -> None:
        check_types(self)
        require(bool(self.input), "input", "at least one path", self.input)
        at_least_one = (
            "max_source_length", "max_target_length", "epochs", "max_steps", "batch_tokens", "micro_batch_tokens",
            "log_every", "checkpoint_every", "lora_rank", "evaluate_every", "evaluate_rows", "patience", "num_beams",
        )  # fmt: skip
        for name in at_least_one:
            value = getattr(self, name)
            require(value is None or value >= 1, name, "at least 1", value)
        for name in ("max_error_rate", "dropout", "lora_dropout"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, name, "from 0 to 1", value)
        decay = self.average_decay
        require(decay is None or 0 < decay < 1, "average_decay", "above 0 and below 1", decay)
        require(self.mix_temperature > 0, "mix_temperature", "above 0", self.mix_temperature)
        require(self.cpus_per_worker > 0, "cpus_per_worker", "above 0", self.cpus_per_worker)
        require(self.max_failures >= 0, "max_failures", "at least 0", self.max_failures)
        require(self.text_column != self.summary_column, "summary_column", "not the text column", self.summary_column)
        unknown = [name for name in self.metrics or () if name not in METRICS]
        require(not unknown, "metrics", f"of {', '.join(METRICS)}", unknown)
        known = ("val_loss", *(self.metrics or ()))
        require(self.best_metric in known, "best_metric", f"one of {', '.join(known)}", self.best_metric)
        self._check_needs()
        self.weights()
        self.worker_range()

    def _check_needs(self) -> None:
        if self.validation_input is None:
            for name in ("metrics", "patience", "evaluate_every"):
                value = getattr(self, name)
                require(value is None, name, "given with --validation-input", value)
        if self.strategy == "fsdp":
            require(not self.compile_layers, "compile_layers", "left out with --strategy fsdp", True)
            require(self.optimizer != "adafactor", "optimizer", "adamw, adam or sgd with --strategy fsdp", "adafactor")

    def columns(self) -> list[str]:
        """What is read: the source and target texts, and the languages' columns where they are named."""
        languages = (self.source_lang_column, self.target_lang_column)
        return [self.text_column, self.summary_column, *(name for name in languages if name is not None)]

    def weights(self) -> tuple[float, ...] | None:
        """The numbers of --input-weights."""
        if self.input_weights is None:
            return None
        try:
            weights = tuple(float(weight) for weight in self.input_weights)
        except ValueError:
            weights = ()
        good = len(weights) == len(self.input) and all(0 < weight < math.inf for weight in weights)
        require(good, "input_weights", f"{len(self.input)} numbers above 0, one an --input", self.input_weights)
        return weights

    def worker_range(self) -> tuple[int, int]:
        """(fewest, most) workers."""
        low, _, high = self.num_workers.partition(":")
        if not (low.isdecimal() and (high or low).isdecimal() and 1 <= int(low) <= int(high or low)):
            raise SettingsError(f"--num-workers must be N or MIN:MAX, of at least 1. Received: {self.num_workers!r}")
        return int(low), int(high or low)

    def identity(self) -> dict[str, Any]:
        """The settings that decide what is trained, for the fingerprint; inputs and preset go in by content."""
        return flags.identity(self, left_out=("input", "validation_input", "preset"))


def parse(argv: Sequence[str], description: str, defaults: Mapping[str, Any]) -> FinetuneSettings:
    """Settings from flags, over those of --config, over `defaults`. Raises SettingsError; argparse SystemExit(2)."""
    return flags.parse(FinetuneSettings, argv, description, defaults)
