"""What a generate job can be told: one frozen dataclass, from which the flags and the TOML file's keys are made."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any

from s2s_ray.errors import SettingsError
from s2s_ray.pipelines import flags
from s2s_ray.pipelines.flags import check_types, fields_of, flag, identity, require, setting

SAMPLERS = ("greedy", "beam", "random", "top_k", "top_p", "contrastive", "speculative")
ON_LONG = ("truncate", "error", "split")
SEGMENT = ("none", "sentence")
PUBLISH = ("auto", "rename", "copy", "none")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """All settings of a generate job. None means the preset's own value. Raises SettingsError when out of range."""

    input: tuple[str, ...] = setting(
        MISSING, "Parquet files, folders or globs on any fsspec filesystem, read in the order given", tuple
    )
    output: str = setting(MISSING, "directory to write; a rerun with the same settings resumes", identity=False)
    preset: str = setting(MISSING, "built-in name, directory, hf://org/name@revision, store name@version, or URL")
    text_column: str = setting("text", "column with the source text (string, or binary read as UTF-8)")
    summary_column: str = setting("summary", "name of the new column with the generated text")
    columns: tuple[str, ...] | None = setting(None, "input columns to keep; all by default", tuple)
    score: bool = setting(False, "add a `score` column: sum of log-probabilities (beams: length-normalised)", bool)
    source_prefix: str | None = setting(None, "text put before every source, such as T5's 'summarize: '")
    source_lang: str | None = setting(None, "language of the sources, by a code the preset knows: en, deu_Latn")
    target_lang: str | None = setting(None, "language to generate")
    source_lang_column: str | None = setting(None, "column with each row's source language")
    target_lang_column: str | None = setting(None, "column with each row's target language")
    segment: str = setting("none", "what the model reads at one time: a whole text or a sentence", choices=SEGMENT)
    max_source_length: int | None = setting(None, "longest source, special tokens included", int, unit="tokens")
    max_target_length: int | None = setting(None, "most new tokens, the end token included", int, unit="tokens")
    min_length: int | None = setting(None, "shortest target, as transformers' min_length", int, unit="tokens")
    num_beams: int | None = setting(None, "beams per row", int)
    sampler: str | None = setting(None, "how the next token is chosen", choices=SAMPLERS)
    temperature: float | None = setting(None, "divides the logits when sampling", float)
    top_k: int | None = setting(None, "among how many of the likeliest tokens (samplers top_k, contrastive: 5)", int)
    top_p: float | None = setting(None, "sample among tokens of this total probability (sampler top_p: 0.1)", float)
    penalty_alpha: float | None = setting(None, "weight of unlikeness in sampler contrastive, 0 to 1 (0.6)", float)
    draft_preset: str | None = setting(
        None, "small preset that guesses for sampler speculative; by default the row's source does", identity=False
    )
    draft_tokens: int = setting(5, "guesses a step of sampler speculative", int, unit="tokens", identity=False)
    length_penalty: float | None = setting(None, "exponent of the length in a beam's score", float)
    no_repeat_ngram_size: int | None = setting(None, "no n-gram of this size comes twice; 0 is off", int)
    repetition_penalty: float | None = setting(None, "above 1 makes tokens that came already less likely", float)
    seed: int = setting(0, "with the row's position it alone decides what is sampled", int)
    dtype: str = setting("float32", "of weights and activations", choices=DTYPES)
    quantization: str | None = setting(None, "products of the weights in int8, on a CPU", choices=("int8",))
    on_long: str = setting(
        "truncate", "sources above the limit: cut and marked, an error row, or in parts", choices=ON_LONG
    )
    skip_bad_files: bool = setting(False, "leave out files with an unreadable footer instead of stopping", bool)
    rows_per_unit: int | None = setting(
        None, "rows that are committed together; by default about 1/200 of the input, 128 to 10000", int, unit="rows"
    )
    max_error_rate: float = setting(0.1, "share of rows that may fail before the job does", float, identity=False)
    max_batch_tokens: int | None = setting(
        None, "memory bound of one replica's engine; found by itself by default", int, unit="tokens", identity=False
    )
    device: str | None = setting(None, "cpu or cuda; by default a GPU where there is one", identity=False)
    num_replicas: str = setting(
        "auto", "models at work: N, MIN:MAX to autoscale, or auto (one per GPU, else per node)", identity=False
    )
    gpus_per_replica: float | None = setting(
        None, "GPUs reserved per replica; by default 1 where the cluster has GPUs", float, unit="GPUs", identity=False
    )
    stall_timeout: float = setting(
        1800.0,
        "the job ends with exit code 75 when nothing has moved for so long",
        float,
        unit="seconds",
        identity=False,
    )
    publish: str = setting(
        "auto", "rename: links on a local disk; copy; none: manifest only", choices=PUBLISH, identity=False
    )
    dry_run: bool = setting(False, "print the plan and stop; nothing is written", bool, identity=False)
    address: str | None = setting(
        None, "Ray cluster to use; by default RAY_ADDRESS, else a Ray of its own on this machine", identity=False
    )

    def __post_init__(self) -> None:
        check_types(self)
        require(bool(self.input), "input", "at least one path", self.input)
        for name in (
            "max_source_length",
            "max_target_length",
            "num_beams",
            "rows_per_unit",
            "max_batch_tokens",
            "draft_tokens",
        ):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "at least 1", value)
        require(0 <= self.max_error_rate <= 1, "max_error_rate", "from 0 to 1", self.max_error_rate)
        require(self.stall_timeout > 0, "stall_timeout", "above 0 seconds", self.stall_timeout)
        gpus = self.gpus_per_replica
        require(gpus is None or 0 <= gpus < 64, "gpus_per_replica", "from 0 to 64", gpus)
        require(bool(self.text_column), "text_column", "a column name", self.text_column)
        require(bool(self.summary_column), "summary_column", "a column name", self.summary_column)
        for side in ("source", "target"):
            both = getattr(self, f"{side}_lang") is not None and getattr(self, f"{side}_lang_column") is not None
            require(not both, f"{side}_lang", f"left out where {flag(f'{side}_lang_column')} is given", "both")
        splits = self.on_long == "split"
        require(
            not splits or self.segment == "sentence", "on_long", "truncate or error without --segment sentence", "split"
        )
        self.replica_range()
        self.generation_changes()

    def preprocessing(self) -> dict[str, Any]:
        """What to replace in the preset's preprocessor: arguments of its `from_directory`."""
        return {name: getattr(self, name) for name in ("source_prefix", "source_lang", "target_lang")}

    def language_columns(self) -> list[str]:
        """The input columns that hold languages."""
        return [name for name in (self.source_lang_column, self.target_lang_column) if name is not None]

    def replica_range(self) -> tuple[int, int] | None:
        """(smallest, largest) number of replicas; None for auto."""
        if self.num_replicas == "auto":
            return None
        low, _, high = self.num_replicas.partition(":")
        if not (low.isdecimal() and (high or low).isdecimal() and 1 <= int(low) <= int(high or low)):
            require(False, "num_replicas", "N, MIN:MAX or auto, of at least 1", self.num_replicas)
        return int(low), int(high or low)

    def generation_changes(self) -> dict[str, Any]:
        """What to replace in the preset's own GenerationSettings.

        Raises SettingsError for a combination of which one part would be ignored.
        """
        changes: dict[str, Any] = {
            "max_new_tokens": self.max_target_length,
            "min_length": self.min_length,
            "length_penalty": self.length_penalty,
            "no_repeat_ngram_size": self.no_repeat_ngram_size,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
            "output_scores": self.score or None,
            **self._sampler_changes(),
        }
        return {name: value for name, value in changes.items() if value is not None}

    def _sampler_changes(self) -> dict[str, Any]:
        sampling = self.sampler in ("random", "top_k", "top_p")
        contrastive = self.sampler == "contrastive"
        for name, fits, needed in (
            ("temperature", sampling or contrastive, "random, top_k, top_p or contrastive"),
            ("top_k", sampling or contrastive, "random, top_k, top_p or contrastive"),
            ("top_p", sampling, "random, top_k or top_p"),
            ("penalty_alpha", contrastive, "contrastive"),
            ("draft_preset", self.sampler == "speculative", "speculative"),
        ):
            if getattr(self, name) is not None and not fits:
                raise SettingsError(f"{flag(name)} needs --sampler {needed}. Received: {self.sampler}")
        if self.sampler in (None, "beam"):
            beams = self.num_beams or (5 if self.sampler else None)  # KerasHub's BeamSampler has 5
            return {"num_beams": beams, **({"do_sample": False, "penalty_alpha": 0.0} if beams else {})}
        if (self.num_beams or 1) != 1:
            raise SettingsError(f"--num-beams above 1 needs --sampler beam. Received: {self.sampler}")
        if self.sampler in ("greedy", "speculative"):
            return {"num_beams": 1, "do_sample": False, "penalty_alpha": 0.0}
        if contrastive:
            return {
                "num_beams": 1,
                "do_sample": False,
                "temperature": self.temperature,
                "top_k": self.top_k if self.top_k is not None else 5,
                "penalty_alpha": self.penalty_alpha if self.penalty_alpha is not None else 0.6,
            }
        return {
            "num_beams": 1,
            "do_sample": True,
            "penalty_alpha": 0.0,
            "temperature": self.temperature,
            "top_k": self.top_k if self.top_k is not None else 5 if self.sampler == "top_k" else 0,
            "top_p": self.top_p if self.top_p is not None else 0.1 if self.sampler == "top_p" else 1.0,
        }

    def identity(self) -> dict[str, Any]:
        """The settings that decide what the rows are, for the fingerprint; inputs and preset go in by content."""
        return identity(self, left_out=("input", "preset"))


FIELDS = fields_of(GenerateSettings)


def parse(argv: Sequence[str], description: str, defaults: Mapping[str, Any]) -> GenerateSettings:
    """Settings from flags, over those of --config, over `defaults`. Raises SettingsError; argparse SystemExit(2)."""
    return flags.parse(GenerateSettings, argv, description, defaults)
