"""One worker's part of a fine-tuning run: from the job's settings to the training loop. No Ray."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2s_ray import presets
from s2s_ray.pipelines.finetune_settings import FinetuneSettings
from s2s_ray.presets.cache import cache_directory
from s2s_ray.storage import Location

if TYPE_CHECKING:
    import torch

    from s2s_ray.nn.lora import LoraSettings
    from s2s_ray.seq2seq_lm import Seq2SeqLM
    from s2s_ray.training.batches import Examples, Mixture
    from s2s_ray.training.distributed import World
    from s2s_ray.training.evaluation import Validation
    from s2s_ray.training.loop import LoopSettings


def train(
    config: dict[str, Any],
    settings: FinetuneSettings,
    device: "torch.device",
    local_rank: int,
    emit: Callable[[dict[str, Any]], None],
) -> None:
    """Run the loop to its end; `config` is what pipelines/finetune.py gave the workers."""
    from s2s_ray.training.checkpoint import Checkpoints
    from s2s_ray.training.distributed import World
    from s2s_ray.training.loop import Loop

    world = World.current(device)
    directory = presets.resolve(settings.preset, expected_digest=config["preset_digest"]).directory
    make_task = partial(build_task, directory, settings)
    examples = _examples(config, "train", make_task(), world, local_rank)
    validation = None
    if "validation" in config["data"]:
        validation = _validation(config, settings, make_task(), world, local_rank)
    mixture = _mixture(config["data"]["train"]["inputs"], settings)
    checkpoints = Checkpoints(Location.parse(settings.output) / "checkpoints")
    loop_options = loop_settings(settings, device, mixture)
    Loop(make_task, examples, loop_options, checkpoints, world=world, validation=validation, emit=emit).run()


def build_task(directory: Path, settings: FinetuneSettings) -> "Seq2SeqLM":
    """The task to train, in fp32 on the CPU."""
    from s2s_ray.nn.lora import add_lora
    from s2s_ray.seq2seq_lm import Seq2SeqLM

    task = Seq2SeqLM.from_preset(
        directory,
        source_prefix=settings.source_prefix,
        source_lang=settings.source_lang,
        target_lang=settings.target_lang,
    )
    if settings.dropout is not None:
        backbone: Any = task.backbone
        for module in (backbone, *backbone.encoder_layers, *backbone.decoder_layers):
            module.dropout = settings.dropout
    lora = lora_settings(settings)
    if lora is not None:
        add_lora(task.backbone, lora, seed=settings.seed)
    return task


def lora_settings(settings: FinetuneSettings) -> "LoraSettings | None":
    """LoRA as the flags say; None without --lora-rank."""
    from s2s_ray.nn.lora import LoraSettings

    if settings.lora_rank is None:
        return None
    return LoraSettings(
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        dropout=settings.lora_dropout,
        targets=settings.lora_targets,
    )


def write_adapter(checkpoint: Path, preset: Path, settings: FinetuneSettings, directory: Path) -> None:
    """The LoRA weights of a checkpoint as PEFT's files, in an existing directory; `preset` is what was trained from."""
    import torch

    from s2s_ray.nn.lora import save_adapter
    from s2s_ray.training.checkpoint import read_tensors

    backbone, lora = build_task(preset, settings).backbone, lora_settings(settings)
    assert lora is not None
    state = backbone.state_dict()
    prefix = "weights/" if settings.average_decay is None else "average/"
    with torch.no_grad():
        for name, tensor in read_tensors(checkpoint, prefix):
            state[name].copy_(tensor)
    save_adapter(backbone, lora, directory)


def loop_settings(settings: FinetuneSettings, device: "torch.device", mixture: "Mixture | None") -> "LoopSettings":
    """The part of the job's settings that the loop follows."""
    from s2s_ray.training.loop import LoopSettings
    from s2s_ray.training.loss import CrossEntropy
    from s2s_ray.training.optimizers import OptimizerSettings

    by_name: Any = settings
    optimizer = OptimizerSettings(
        name=by_name.optimizer,
        learning_rate=settings.learning_rate,
        schedule=by_name.schedule,
        warmup_steps=settings.warmup_steps,
        final_learning_rate=settings.final_learning_rate,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm or None,
    )
    automatic: Any = "bf16" if device.type == "cuda" else "fp32"
    return LoopSettings(
        optimizer=optimizer,
        loss=CrossEntropy(label_smoothing=settings.label_smoothing),
        epochs=settings.epochs or (None if settings.max_steps else 1),
        max_steps=settings.max_steps,
        batch_tokens=settings.batch_tokens,
        micro_batch_tokens=settings.micro_batch_tokens,
        mixture=mixture,
        seed=settings.seed,
        precision=automatic if settings.precision == "auto" else by_name.precision,
        strategy=by_name.strategy,
        compile_layers=settings.compile_layers,
        recompute_activations=settings.recompute_activations,
        average_decay=settings.average_decay,
        log_every=settings.log_every,
        checkpoint_every=settings.checkpoint_every,
        evaluate_every=settings.evaluate_every,
        best_metric=settings.best_metric,
        patience=settings.patience,
    )


def _mixture(sizes: list[int], settings: FinetuneSettings) -> "Mixture | None":
    from s2s_ray.training.batches import Mixture

    weights = settings.weights()
    if weights is not None:
        return Mixture(tuple(sizes), weights)
    return Mixture.tempered(sizes, settings.mix_temperature) if len(sizes) > 1 else None


def _examples(config: dict[str, Any], name: str, task: "Seq2SeqLM", world: "World", local_rank: int) -> "Examples":
    """The tokenised pairs; those on an object store are fetched once per node."""
    from s2s_ray.training.shards import open_shards

    source = Location.parse(config["tokens"])
    paths = [Path(source.path) / file for file in config["data"][name]["files"]]
    if not source.is_local:
        directory = cache_directory() / "tokens" / source.parent.name
        paths = [directory / path.name for path in paths]
        if local_rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            for path in paths:
                _download(source / path.name, path)
        world.gather(local_rank)  # until all nodes have them
    assert task.preprocessor is not None
    return open_shards(paths, task.preprocessor.tokenizer.pad_token_id)


def _download(source: Location, target: Path) -> None:
    if not target.exists():
        temporary = target.with_suffix(f".{id(target)}.tmp")
        source.download(temporary)
        temporary.replace(target)


def _validation(
    config: dict[str, Any], settings: FinetuneSettings, task: "Seq2SeqLM", world: "World", local_rank: int
) -> "Validation":
    from s2s_ray.training.evaluation import Validation

    sources, references, source_lang, target_lang = config["sample"]
    generation = {"num_beams": settings.num_beams, "max_new_tokens": settings.max_target_length}
    return Validation(
        examples=_examples(config, "validation", task, world, local_rank),
        sources=sources,
        references=references,
        metrics=settings.metrics or (),
        generation={name: value for name, value in generation.items() if value is not None},
        languages={
            name: column
            for name, column in (("source_lang", source_lang), ("target_lang", target_lang))
            if column is not None
        },
    )
