"""What every family must do, shown against a tiny randomly initialised transformers model of it.

A family's test module hands a transformers config to `check_family`. Only the weights and the config travel, through
the public import path.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from s2s_ray import models
from s2s_ray.errors import PresetIntegrityError
from s2s_ray.generation.engine import Engine
from s2s_ray.generation.requests import Finished, Request
from s2s_ray.generation.settings import GenerationSettings
from s2s_ray.models.backbone import Backbone
from s2s_ray.models.loading import build_backbone, save_weights
from s2s_ray.text.tokenizer import read_json_object

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@torch.no_grad()
def vary_norms_and_biases(model: Any) -> None:
    """Draw every bias and norm: as transformers makes them they are alike, and exchanging two would not show."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.normal_(std=1.0 if (parameter == 1).all() else 0.3)


def reference_model(
    config: Any,
    *,
    stop_bias: float = 0.0,
    adjust: Callable[[Any], None] = vary_norms_and_biases,
    seed: int = 0,
) -> Any:
    """A random transformers model, `adjust`ed where the family's own initialisation does not try it; with `stop_bias`
    its outputs end raggedly.

    It is added to the end token's logit, or, in a family whose logits have no bias, multiplies the row of the output
    projection that makes that logit.
    """
    torch.manual_seed(seed)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    adjust(model)
    with torch.no_grad():
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_(std=0.3)
            model.final_logits_bias[0, config.eos_token_id] += stop_bias
        elif stop_bias:
            model.get_output_embeddings().weight[config.eos_token_id] *= stop_bias
    return model


def load_ours(model: Any, directory: Path) -> Backbone:
    """The same model through our import path."""
    model.save_pretrained(directory)
    return load_directory(directory)


def load_directory(directory: Path) -> Backbone:
    """A directory that transformers wrote, through our import path."""
    config = read_json_object(directory / "config.json")
    task = models.task_class(config["model_type"])
    return build_backbone(task.backbone_cls, config, directory).eval()


def sources(config: Any, count: int, seed: int = 1, longest: int = 40) -> list[list[int]]:
    """Ragged rows of ids, 2 to `longest` + 1 tokens: the start token (if the family has one), ordinary tokens, the end
    token.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    bos = [token for token in (getattr(config, "bos_token_id", None),) if token is not None]
    rows = (ordinary_tokens(config, config.vocab_size, (n,), generator).tolist() for n in lengths)
    return [[*bos, *row, config.eos_token_id] for row in rows]


def ordinary_tokens(config: Any, vocabulary_size: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random ids below `vocabulary_size`, int64, none of them a special token."""
    ids = torch.randint(4, vocabulary_size, shape, generator=generator)
    names = ("pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id")
    special = [token for name in names if (token := getattr(config, name, None)) is not None]
    plain = next(token for token in range(4, vocabulary_size) if token not in special)
    return torch.where(torch.isin(ids, torch.tensor(special)), plain, ids)


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """ids int64 and mask bool, both `[B, S]`."""
    ids = torch.full((len(rows), max(map(len, rows))), pad)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    return ids, torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]


def reference_tokens(model: Any, rows: list[list[int]], **settings: Any) -> list[list[list[int]]]:
    """What transformers generates for a padded batch: each row's sequences, start token off, cut at the end token."""
    ids, mask = padded(rows, model.config.pad_token_id)
    given = {"do_sample": False, "num_beams": 1, "forced_eos_token_id": None} | settings
    output = model.generate(input_ids=ids, attention_mask=mask.long(), **given)
    each = settings.get("num_return_sequences", 1)
    ends = given.get("eos_token_id", model.config.eos_token_id)
    cut = [_cut(row[1:], [ends] if isinstance(ends, int) else ends) for row in output.tolist()]
    return [cut[i : i + each] for i in range(0, len(cut), each)]


def _cut(ids: list[int], ends: list[int]) -> list[int]:
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))]


def settings_of(config: Any, **settings: Any) -> GenerationSettings:
    """Settings with the model's special tokens."""
    tokens = {
        "eos_token_id": (config.eos_token_id,),
        "pad_token_id": config.pad_token_id,
        "decoder_start_token_id": config.decoder_start_token_id,
    }
    return GenerationSettings(**(tokens | settings))


def run(engine: Engine, rows: list[list[int]], settings: GenerationSettings) -> list[Finished]:
    """Our answers, in the rows' order."""
    answers = engine.generate(Request(i, row, settings, (), i) for i, row in enumerate(rows))
    return sorted(answers, key=lambda answer: answer.request.row_id)


def our_tokens(engine: Engine, rows: list[list[int]], settings: GenerationSettings) -> list[list[list[int]]]:
    """Our tokens, in the rows' order; fails on an error row."""
    answers = run(engine, rows, settings)
    assert all(answer.error is None for answer in answers)
    return [[sequence.token_ids for sequence in answer.sequences] for answer in answers]


def check_family(
    config: Any, tmp_path: Path, *, stop_bias: float = 0.0, adjust: Callable[[Any], None] = vary_norms_and_biases
) -> None:
    """Logits, greedy and beam tokens, batched = single, cached = uncached, and the way back to transformers.

    With `stop_bias` the rows' outputs must end at different lengths; see `reference_model` for it and for `adjust`.
    """
    model = reference_model(config, stop_bias=stop_bias, adjust=adjust)
    ours = load_ours(model, tmp_path / "theirs")
    rows = sources(config, 12)
    _check_logits(model, ours, rows)
    engine = Engine(ours, max_slots=20)
    # Random models repeat themselves: the ban makes their outputs worth comparing.
    greedy: dict[str, Any] = {"max_length": 24, "no_repeat_ngram_size": 2}
    batched = our_tokens(engine, rows, settings_of(config, **greedy))
    assert batched == reference_tokens(model, rows, **greedy)
    beams = greedy | {"num_beams": 4}
    assert our_tokens(engine, rows, settings_of(config, **beams)) == reference_tokens(model, rows, **beams)
    assert [our_tokens(engine, [row], settings_of(config, **greedy))[0] for row in rows] == batched
    if stop_bias:
        assert len({len(row[0]) for row in batched}) > 1, "no ragged end: choose another stop_bias"
    _check_cached_is_uncached(ours, rows, our_tokens(engine, rows, settings_of(config, max_length=24)), config)
    _check_way_back(model, ours, tmp_path / "ours")


def _check_logits(model: Any, ours: Backbone, rows: list[list[int]]) -> None:
    batch = teacher_forced(model.config, rows)
    theirs = reference_logits(model, batch)
    with torch.no_grad():
        assert (ours(batch) - theirs).abs().max() <= 1e-4
        ours.pack()
        # GELU in another rounding: in a T5 1.1 of these, transformers' own fp32 lies 6e-4 from double precision.
        assert (ours(batch) - theirs).abs().max() <= 1e-5 * max(10.0, float(theirs.abs().max()))


def teacher_forced(config: Any, rows: list[list[int]], length: int = 9) -> dict[str, Tensor]:
    """A batch of the rows with random targets of `length` tokens."""
    ids, mask = padded(rows, config.pad_token_id)
    size = getattr(config, "decoder_vocab_size", None) or config.vocab_size
    targets = ordinary_tokens(config, size, (len(rows), length), torch.Generator().manual_seed(2))
    return {"encoder_token_ids": ids, "encoder_padding_mask": mask, "decoder_token_ids": targets}


@torch.no_grad()
def reference_logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """transformers' logits `[B, T, V]` of a batch in our names."""
    ids, mask, targets = (batch[name] for name in ("encoder_token_ids", "encoder_padding_mask", "decoder_token_ids"))
    logits: Tensor = model(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=targets).logits
    return logits


@torch.no_grad()
def _check_cached_is_uncached(
    ours: Backbone, rows: list[list[int]], outputs: list[list[list[int]]], config: Any
) -> None:
    ours.train().eval()  # drops the packed weights: the plain path
    ids, mask = padded(rows, config.pad_token_id)
    targets, real = padded([row[0] for row in outputs], config.pad_token_id)
    start = torch.full((len(rows), 1), config.decoder_start_token_id)
    batch = {
        "encoder_token_ids": ids,
        "encoder_padding_mask": mask,
        "decoder_token_ids": torch.cat((start, targets), 1),
    }
    chosen = ours(batch)[:, :-1].argmax(dim=-1)
    assert torch.equal(chosen[real], targets[real])


def check_files(config: Any, tmp_path: Path, *, adjust: Callable[[Any], None] = vary_norms_and_biases) -> None:
    """Every tensor of a checkpoint is needed, no other is accepted, and copies of tied ones must be equal.

    One config for each way of tying is enough; few layers make it quick.
    """
    model = reference_model(config, adjust=adjust)
    ours = load_ours(model, tmp_path)
    # copies, as what load_file gives may be the mapped file, which is overwritten below
    held = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}

    def load(tensors: Mapping[str, Tensor]) -> Backbone:
        save_file(dict(tensors), tmp_path / "model.safetensors", metadata={"format": "pt"})
        return load_directory(tmp_path)

    names = {ours.checkpoint_name(name): name for name in ours.state_dict()}
    for name in held:
        optional = names[name] in ours.optional_parameters
        if not optional and not held.keys() & set(ours.aliases(name)):
            with pytest.raises(PresetIntegrityError, match=rf"must hold {re.escape(name)}; it is missing"):
                load({key: tensor for key, tensor in held.items() if key != name})
    with pytest.raises(PresetIntegrityError, match="nothing in the model takes a_stranger"):
        load({**held, "a_stranger": torch.zeros(2)})
    for copy, original in model.all_tied_weights_keys.items():
        if copy in held:  # not tied after all
            continue
        again = load({**held, copy: held[original].clone()})
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in ours.state_dict().items())
        with pytest.raises(PresetIntegrityError, match="but the two differ"):
            load({**held, copy: held[original] + 1})


def _check_way_back(model: Any, ours: Backbone, directory: Path) -> None:
    """Saved as a preset, in shards: transformers finds its own weights bit for bit, and computes its own logits."""
    directory.mkdir()
    models.task_class(ours.model_type)(ours).write_files(directory)
    (directory / "model.safetensors").unlink()
    save_weights(ours, directory, max_shard_bytes=20_000)
    same_in_transformers(model, directory)


def same_in_transformers(model: Any, directory: Path) -> None:
    """What transformers loads from the directory is `model`: every tensor, and the logits."""
    again, report = type(model).from_pretrained(directory, dtype=model.dtype, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    batch = teacher_forced(model.config, sources(model.config, 4))
    assert torch.equal(reference_logits(again.eval(), batch), reference_logits(model, batch))
