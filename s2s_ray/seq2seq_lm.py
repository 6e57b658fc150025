"""The task: text in, text out. KerasHub's `Seq2SeqLM` in torch, its signatures kept, additions keyword-only."""

import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from s2s_ray import models, presets
from s2s_ray.errors import PresetError, SettingsError
from s2s_ray.generation import samplers
from s2s_ray.generation.engine import Engine
from s2s_ray.generation.requests import Finished, Request
from s2s_ray.generation.settings import GenerationSettings
from s2s_ray.generation.speculative import Speculation
from s2s_ray.models.backbone import Backbone
from s2s_ray.models.loading import build_backbone, save_weights
from s2s_ray.nn.linear import check_quantization
from s2s_ray.presets.saving import new_preset
from s2s_ray.task_inputs import Calls, GeneratedText, read_inputs
from s2s_ray.text.inputs import Lang, is_column
from s2s_ray.text.preprocessor import Seq2SeqLMPreprocessor
from s2s_ray.text.tokenizer import read_json_object

if TYPE_CHECKING:
    from s2s_ray.training.fit import History

__all__ = ["GeneratedText", "Seq2SeqLM"]

_TOKEN_KEYS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
_SCORE_ROWS = 32  # scored at one time


class _Presets:
    """`Seq2SeqLM.presets`: the built-in names a class can load, with their metadata."""

    def __get__(self, instance: object, owner: "type[Seq2SeqLM]") -> dict[str, dict[str, Any]]:
        found = presets.builtin_names()
        backbone = getattr(owner, "backbone_cls", None)
        if backbone is None:
            return found
        return {name: data for name, data in found.items() if _model_type(data) == backbone.model_type}


def _model_type(metadata: Mapping[str, Any]) -> Any:
    if "directory" in metadata:
        return read_json_object(Path(metadata["directory"]) / "config.json").get("model_type")
    return metadata.get("path")


class Seq2SeqLM:
    """An encoder-decoder language model with its preprocessor: generation, scoring and fine-tuning.

    Use `Seq2SeqLM.from_preset(...)`, which returns the subclass of the preset's family. Until `compile` sets a sampler,
    `generate` follows the preset's own generation settings.
    """

    backbone_cls: ClassVar[type[Backbone]]
    presets: ClassVar[Any] = _Presets()

    def __init__(
        self,
        backbone: Backbone,
        preprocessor: Seq2SeqLMPreprocessor | None = None,
        *,
        generation_settings: GenerationSettings | None = None,
        generation_config: Mapping[str, Any] | None = None,
    ) -> None:
        """generation_config: what `generation_config.json` held, written back by `save_to_preset`."""
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.generation_config = dict(generation_config or {})
        self.generation_settings = generation_settings or GenerationSettings.from_configs(
            backbone.config, self.generation_config
        )
        self.sampler: samplers.Sampler | None = None
        self.optimizer: Any = "auto"
        self.loss: Any = "auto"
        self.weighted_metrics: Any = "auto"
        self._engines: dict[Any, Engine] = {}

    @classmethod
    def from_preset(
        cls,
        preset: str | os.PathLike[str],
        load_weights: bool = True,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        quantization: str | None = None,
        encoder_sequence_length: int | None = None,
        decoder_sequence_length: int | None = None,
        source_prefix: str | None = None,
        source_lang: str | None = None,
        target_lang: str | None = None,
    ) -> "Seq2SeqLM":
        """Load a preset: a built-in name, a directory, `hf://org/name[@revision]`, a URL, or `name@version` of a store.

        load_weights=False initialises randomly. dtype: "float32" (default), "bfloat16" or "float16". device: as
        torch's, default "cpu". quantization: "int8" generates with int8 products (float32 on a CPU only); training
        and saved files keep the float weights. The lengths, in tokens, `source_prefix` and the languages override the
        preset's preprocessor. Raises PresetError, PresetIntegrityError, UnsupportedModelError or LanguageError.
        """
        directory = presets.resolve(preset).directory
        config = read_json_object(directory / "config.json")
        task = models.task_class(config.get("model_type"))
        if not issubclass(task, cls):
            raise PresetError(f"{preset} holds a {task.__name__}, which is no {cls.__name__}: load it with that class")
        preprocessor = Seq2SeqLMPreprocessor.from_directory(
            directory,
            encoder_sequence_length=encoder_sequence_length,
            decoder_sequence_length=decoder_sequence_length,
            source_prefix=source_prefix,
            source_lang=source_lang,
            target_lang=target_lang,
        )
        weights = directory if load_weights else None
        backbone = build_backbone(task.backbone_cls, config, weights, dtype=dtype, device=device)
        parameter = next(backbone.parameters())
        check_quantization(quantization, parameter.device, parameter.dtype)
        backbone.quantization = quantization
        generation_config = read_json_object(directory / "generation_config.json")
        return task(
            backbone,
            preprocessor,
            generation_settings=_generation_settings(config, generation_config),
            generation_config=generation_config,
        )

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return next(self.backbone.parameters()).device

    def compile(
        self,
        optimizer: Any = "auto",
        loss: Any = "auto",
        *,
        weighted_metrics: Any = "auto",
        sampler: Any = "top_k",
    ) -> None:
        """Choose how to train and how to generate. An unknown name raises SettingsError that lists the known ones.

        optimizer: "auto" is Adam(2e-5). loss: "auto" is cross-entropy from logits over real tokens. weighted_metrics:
        "auto" is token accuracy. sampler: a name, a class, or an instance of `s2s_ray.samplers`; None goes back to the
        preset's own generation settings.
        """
        from s2s_ray.training.compiled import check_compiled

        check_compiled(optimizer, loss, weighted_metrics)
        self.sampler = None if sampler is None else samplers.get(sampler)
        self.optimizer, self.loss, self.weighted_metrics = optimizer, loss, weighted_metrics

    def fit(self, x: Any = None, y: Any = None, *, num_workers: int | None = None, **options: Any) -> "History":
        """Fine-tune on pairs of texts; see `s2s_ray.training.fit.fit` for what `x` may be and for the options.

        With `num_workers`, or x a Ray Dataset, it runs on a Ray cluster: see `s2s_ray.pipelines.fit.fit`.
        """
        ray_data = sys.modules.get("ray.data")  # a Dataset cannot be there without it
        if num_workers is not None or (ray_data and isinstance(x, ray_data.Dataset)):
            from s2s_ray.pipelines.fit import fit as fit_on_workers

            return fit_on_workers(self, x, y, num_workers=1 if num_workers is None else num_workers, **options)
        from s2s_ray.training.fit import fit

        return fit(self, x, y, **options)

    def evaluate(self, x: Any = None, y: Any = None, **options: Any) -> dict[str, float]:
        """Loss and metrics without training; see `s2s_ray.training.fit.evaluate`."""
        from s2s_ray.training.fit import evaluate

        return evaluate(self, x, y, **options)

    def __call__(self, x: Mapping[str, Any]) -> torch.Tensor:
        """Teacher-forced logits `[B, T, V]` of a batch as the preprocessor makes it."""
        batch = {name: torch.as_tensor(np.asarray(value), device=self.device) for name, value in x.items()}
        return self.backbone(batch)

    def engine(self, *, max_batch_tokens: int | None = None, max_slots: int | None = None) -> Engine:
        """The generation engine on this backbone; asking again with the same sizes returns the same one."""
        return self._engine(max_batch_tokens, max_slots, self.sampler)

    def speculation(self, sampler: samplers.SpeculativeSampler) -> Speculation:
        """What an engine needs of a speculative sampler; its draft preset is loaded once, to this device.

        Raises SettingsError for a draft of another vocabulary, and what `from_preset` raises.
        """
        draft = sampler.draft
        if draft is not None and not isinstance(draft, Seq2SeqLM):
            dtype = next(self.backbone.parameters()).dtype
            draft = sampler.draft = Seq2SeqLM.from_preset(draft, dtype=dtype, device=self.device)
        if draft is None:
            return Speculation(sampler.num_speculative_tokens)
        ours, theirs = self.preprocessor, draft.preprocessor
        if ours and theirs and ours.tokenizer.vocabulary() != theirs.tokenizer.vocabulary():
            raise SettingsError("the draft must have the vocabulary of the model: its tokenizer has other tokens")
        return Speculation(sampler.num_speculative_tokens, draft.backbone)

    def _engine(self, tokens: int | None, slots: int | None, sampler: samplers.Sampler | None) -> Engine:
        custom = sampler if sampler is not None and sampler.is_custom else None
        speculation = self.speculation(sampler) if isinstance(sampler, samplers.SpeculativeSampler) else None
        key = (tokens, slots, id(custom), speculation, self.device, torch.get_num_threads())
        if key not in self._engines:
            self._engines[key] = Engine(
                self.backbone, max_batch_tokens=tokens, max_slots=slots, sampler=custom, speculation=speculation
            )
        self.backbone.pack()  # training may have dropped the packed weights
        return self._engines[key]

    def generate(
        self,
        inputs: Any,
        max_length: Any = None,
        stop_token_ids: Any = "auto",
        strip_prompt: bool = False,
        *,
        source_lang: Lang = None,
        target_lang: Lang = None,
        sampler: Any = None,
        seed: Any = None,
        row_ids: Sequence[int] | None = None,
        num_return_sequences: Any = None,
        max_new_tokens: Any = None,
        return_scores: bool = False,
        return_details: bool = False,
        batch_tokens: int | None = None,
        **settings: Any,
    ) -> Any:
        """Generate from text; what goes in decides what comes out.

        A string gives a string, a list, tuple, NumPy or Arrow array a list. A dictionary holds `encoder_text` and maybe
        `decoder_text`, a prompt the output continues and, unless `strip_prompt`, begins with, and maybe `source_lang`
        and `target_lang`, as the arguments of these names. An iterator or DataLoader
        of any of these gives one list. A dictionary of `encoder_token_ids` (with `encoder_padding_mask`,
        `decoder_token_ids`, `decoder_padding_mask`, all optional, `[B, S]` and `[B, T]`) gives a dictionary of
        `decoder_token_ids` and `decoder_padding_mask`, and is the form for a task without preprocessor.

        max_length: tokens, start token and prompt included; default the preset's. stop_token_ids: "auto" (the
        preset's), None (run to the limit), an id or several. source_lang, target_lang: languages by name, for a preset
        that has some (`preprocessor.languages`). sampler: as in `compile`, for this call. seed, row_ids: a row's draws
        depend on these two alone; row ids default to 0, 1, ... num_return_sequences > 1 gives a list for each row.
        return_scores: gives (outputs, scores). return_details: gives GeneratedText in place of strings. batch_tokens:
        source tokens x beams decoded at one time. settings: any field of GenerationSettings. Every
        setting also takes a list with one value per row. Raises SettingsError or TypeError for settings,
        TokenizationError for text that cannot be read.
        """
        chosen = self.sampler if sampler is None else samplers.get(sampler)
        base = self.generation_settings if chosen is None else self.generation_settings.replace(**chosen.settings())
        calls = Calls(
            base.replace(output_scores=True) if return_scores or return_details else base,
            stop_token_ids,
            {
                "max_length": max_length,
                "max_new_tokens": max_new_tokens,
                "seed": seed,
                "num_return_sequences": num_return_sequences,
                **settings,
            },
            row_ids,
            default_max_length=self._default_max_length(),
        )
        read = read_inputs(inputs, self.preprocessor, source_lang, target_lang)
        engine = self._engine(batch_tokens, None, chosen)
        truncated_before = self.preprocessor.truncated_sources if self.preprocessor else 0
        finished = self._run(engine, calls.requests(read.rows))
        self._warn_of_truncation(truncated_before)
        return read.output(
            finished, strip_prompt=strip_prompt, scores=return_scores, details=return_details, pad=base.pad_token_id
        )

    def _default_max_length(self) -> int | None:
        return self.preprocessor.decoder_sequence_length if self.preprocessor else None

    @staticmethod
    def _run(engine: Engine, requests: Iterable[Request]) -> list[Finished]:
        answers = sorted(engine.generate(requests), key=lambda answer: answer.request.key)  # type: ignore[arg-type, return-value]
        failed = next((answer for answer in answers if answer.error is not None), None)
        if failed is not None:
            raise SettingsError(f"row {failed.request.key}: {failed.error}: {failed.message}")
        return answers

    def _warn_of_truncation(self, before: int) -> None:
        count = (self.preprocessor.truncated_sources if self.preprocessor else 0) - before
        if count and self.preprocessor:
            length = self.preprocessor.encoder_sequence_length
            warnings.warn(f"{count} sources were cut to {length} tokens (encoder_sequence_length)", stacklevel=3)

    @torch.inference_mode()
    def score(
        self,
        sources: Any,
        targets: Any = None,
        *,
        source_lang: Lang = None,
        target_lang: Lang = None,
        per_token: bool = False,
    ) -> Any:
        """Log-probabilities of given targets: the sum over the target's tokens, special tokens included.

        sources and targets: two strings or two sequences of strings, or one dictionary of `encoder_text` and
        `decoder_text`; the languages as in `generate`. Returns a float for strings, else float32 `[rows]`; with
        per_token a float32 array per row.
        """
        if self.preprocessor is None:
            raise SettingsError("score needs a preprocessor: load the task with from_preset")
        pairs = sources if targets is None else {"encoder_text": sources, "decoder_text": targets}
        single = isinstance(pairs["encoder_text"], str)
        source_texts, target_texts = (
            [t] if single else list(t) for t in (pairs["encoder_text"], pairs["decoder_text"])
        )
        columns = {"encoder_text": source_texts, "decoder_text": target_texts}
        for name, lang in (("source_lang", source_lang), ("target_lang", target_lang)):
            columns[name] = list(lang) if is_column(lang) else [lang] * len(source_texts)  # type: ignore[arg-type]
        self.backbone.eval()
        rows: list[NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(source_texts)
        for batch in self._score_batches(source_texts):
            x, y, weight = self.preprocessor({name: [column[i] for i in batch] for name, column in columns.items()})
            logits = self(x).float()
            labels = torch.as_tensor(y, device=logits.device).long()
            gained = (logits.gather(2, labels[..., None]).squeeze(2) - logits.logsumexp(dim=2)).cpu().numpy()
            for index, row, keep in zip(batch, gained, weight, strict=True):
                rows[index] = row[np.asarray(keep, bool)]
        if per_token:
            return rows[0] if single else rows
        sums = np.array([row.sum() for row in rows], np.float32)
        return float(sums[0]) if single else sums

    @staticmethod
    def _score_batches(texts: Sequence[str]) -> Iterator[list[int]]:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        return (order[i : i + _SCORE_ROWS] for i in range(0, len(order), _SCORE_ROWS))

    def save_to_preset(self, preset_dir: str | os.PathLike[str]) -> None:
        """Write a preset directory that `from_preset` and transformers load. All of it appears at once or not at all.

        An existing preset there is replaced; any other non-empty directory raises PresetError.
        """
        with new_preset(Path(preset_dir)) as directory:
            self.write_files(directory)

    def write_files(self, directory: Path) -> None:
        """Write the files of a preset, all but its manifest, into an empty directory."""
        dtype = str(next(self.backbone.parameters()).dtype).removeprefix("torch.")
        config = {k: v for k, v in self.backbone.config.items() if k not in ("torch_dtype", "transformers_version")}
        (directory / "config.json").write_bytes(_json(config | {"dtype": dtype}))
        changed = self.generation_settings.to_config()
        (directory / "generation_config.json").write_bytes(_json(self.generation_config | changed))
        if self.preprocessor is not None:
            self.preprocessor.save(directory)
        save_weights(self.backbone, directory)


def _generation_settings(config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> GenerationSettings:
    # transformers reads generation keys from config.json only where generation_config.json is missing.
    if generation_config:
        config = {key: config[key] for key in _TOKEN_KEYS if key in config}
    return GenerationSettings.from_configs(config, generation_config)


def _json(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"
