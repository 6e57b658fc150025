"""The fine-tuning job: Parquet with pairs of texts in, a preset out, on any number of workers, resumable.

    OUT/preset/         the result: what `from_preset` and jobs/generate.py take
    OUT/adapter/        with LoRA: its weights alone, as PEFT's files
    OUT/checkpoints/    presets with the trainer's state, see training/checkpoint.py
    OUT/report.json     figures of the finished run; its presence says that the run is finished
    OUT/report.svg      its curves
    OUT/_s2s/           whose output this is, and the tokenised data

The way of a pair: tokens.py (CPU tasks) -> training/steps.py (which step it belongs to) -> training/loop.py in every
worker of a Ray Train worker group. The loop owns checkpoints and position; Ray Train starts workers, joins them, and
starts them anew when one is lost.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2s_ray import presets
from s2s_ray.errors import InfrastructureError, SettingsError
from s2s_ray.pipelines import finetune_plot, trackers
from s2s_ray.pipelines import plan as planning
from s2s_ray.pipelines.cluster import ray_session
from s2s_ray.pipelines.finetune_report import FinetuneReport, TrainingProgress, make_report
from s2s_ray.pipelines.finetune_settings import FinetuneSettings
from s2s_ray.pipelines.inputs import InputFile, find_files
from s2s_ray.pipelines.lease import Lease
from s2s_ray.pipelines.ledger import Ledger, check_claim
from s2s_ray.pipelines.plan import Unit
from s2s_ray.pipelines.tokens import TokenJob, cut_inputs, read_pairs, routes_of, tokenise
from s2s_ray.pipelines.workers import Event, run_workers
from s2s_ray.storage import Location, canonical_json, strict_json

if TYPE_CHECKING:
    import torch

REPORT_FILE, PLOT_FILE = "report.json", "report.svg"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run that was found to be possible; nothing is written yet."""

    settings: FinetuneSettings
    output: Location
    units: list[Unit]
    counts: list[int]  # units of each --input
    validation_units: list[Unit]
    document: dict[str, Any]
    preset_digest: str

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.output, planning.fingerprint(self.document))


def run(settings: FinetuneSettings) -> FinetuneReport:
    """Train, or go on training, or find it done. Raises an S2SRayError whose exit code is the job's."""
    prepared = prepare(settings)
    output, ledger = prepared.output, prepared.ledger
    if settings.dry_run:
        return FinetuneReport(output.url, plan=_describe(prepared))
    report = _finished(output)
    if report is None:
        ledger.claim(prepared.document)
        with Lease(ledger.work):
            report = _train(prepared)
            plot = finetune_plot.curves(report["log"], report["evaluations"], settings.best_metric)
            (output / PLOT_FILE).write_atomic(plot.encode())
            (output / REPORT_FILE).write_atomic(canonical_json(report))
            (ledger.root / "tokens").delete(recursive=True)
    published = _publish(output, settings.publish)
    return make_report(output, report, published)


def prepare(settings: FinetuneSettings) -> Prepared:
    """Find out whether the run is possible, cheapest checks first; no model is loaded.

    Raises InputError, PresetError, PresetIntegrityError, SettingsError or FingerprintError.
    """
    output = Location.parse(settings.output)
    settings = dataclasses.replace(settings, output=output.url, preset=presets.absolute(settings.preset))
    find_files(settings.input, output)  # refuses a file that is named twice
    inputs = [find_files([text], output) for text in settings.input]
    validation = [find_files(settings.validation_input, output)] if settings.validation_input else []
    trackers.check(settings.log_to or ())
    preset = presets.resolve(settings.preset)
    document = _document(settings, inputs, validation, preset.digest)
    check_claim(output, document)
    units, counts = cut_inputs(inputs, settings, "--input")
    validation_units, _ = cut_inputs(validation, settings, "--validation-input")
    if settings.publish is not None:
        _store_and_name(settings.publish)
    return Prepared(settings, output, units, counts, validation_units, document, preset.digest)


def _document(
    settings: FinetuneSettings,
    inputs: Sequence[Sequence[InputFile]],
    validation: Sequence[Sequence[InputFile]],
    preset_digest: str,
) -> dict[str, Any]:
    """Everything that decides what is trained; its canonical JSON is hashed into the fingerprint."""
    content = {
        "format": planning.FORMAT_VERSION,
        "job": "finetune",
        "input": [[file.url, file.identity] for files in inputs for file in files],
        "validation_input": [[file.url, file.identity] for files in validation for file in files],
        "inputs": [len(files) for files in inputs],
        "preset": preset_digest,
        **settings.identity(),
    }
    result: dict[str, Any] = strict_json(canonical_json(content), "the settings")
    return result


def _finished(output: Location) -> dict[str, Any] | None:
    try:
        report: dict[str, Any] = strict_json((output / REPORT_FILE).read_bytes(), REPORT_FILE)
        return report
    except FileNotFoundError:
        return None


def _train(prepared: Prepared) -> dict[str, Any]:
    """Tokenise, train and write the preset; returns the report."""
    prepared = _with_new_tokens(prepared)
    settings = prepared.settings
    job = TokenJob(settings, prepared.preset_digest, prepared.ledger.root / "tokens")
    values = dataclasses.asdict(settings)
    tracked = trackers.tracked(settings.log_to or (), prepared.output, prepared.ledger.fingerprint, values)
    with ray_session(settings.address), tracked as track:
        data = {"train": tokenise("train", prepared.units, prepared.counts, job)}
        sample: list[list[str] | None] = [[], [], None, None]
        if prepared.validation_units:
            units = prepared.validation_units
            data["validation"] = tokenise("validation", units, [len(units)], job)
            if settings.metrics:
                sample = validation_sample(units, job)
        config = {
            "settings": values,
            "preset_digest": prepared.preset_digest,
            "tokens": job.directory.url,
            "data": data,
            "sample": sample,
        }
        run_workers(
            train_on_worker,
            config,
            num_workers=settings.worker_range(),
            cpus_per_worker=settings.cpus_per_worker,
            device=settings.device,
            max_failures=settings.max_failures,
            storage=prepared.ledger.root / "ray",
            show=(TrainingProgress().show, track),
        )
    return _write_preset(prepared, data)


def _with_new_tokens(prepared: Prepared) -> Prepared:
    """With --new-tokens, the run's own copy of the preset in place of the one it was given."""
    from s2s_ray.training import checkpoint as files
    from s2s_ray.training.vocabulary import write_extended

    settings, target = prepared.settings, prepared.ledger.root / "preset"
    if not settings.new_tokens:
        return prepared
    if not (target / files.MANIFEST_FILE).exists():
        directory = presets.resolve(settings.preset, expected_digest=prepared.preset_digest).directory
        files.write_sealed(target, lambda empty: write_extended(directory, settings.new_tokens or (), empty))
    digest = presets.resolve(target.url).digest
    return dataclasses.replace(
        prepared, settings=dataclasses.replace(settings, preset=target.url), preset_digest=digest
    )


def _write_preset(prepared: Prepared, data: dict[str, Any]) -> dict[str, Any]:
    from s2s_ray.training import checkpoint as files
    from s2s_ray.training.evaluation import best_step

    checkpoints = files.Checkpoints(prepared.output / "checkpoints")
    newest = checkpoints.newest()
    if newest is None:
        raise InfrastructureError(f"training ended without a checkpoint in {checkpoints.directory}; run it again")
    state = files.read_state(checkpoints.fetch(newest))
    step = best_step(state["evaluations"], prepared.settings.best_metric) or newest
    files.copy_preset(checkpoints.fetch(step), prepared.output / "preset")
    if prepared.settings.lora_rank is not None:
        _write_adapter(prepared, checkpoints.fetch(step))
    return {
        "fingerprint": prepared.ledger.fingerprint,
        "document": prepared.document,
        "steps": newest,
        "preset_step": step,
        "best_metric": prepared.settings.best_metric,
        "data": data,
        "log": state["log"],
        "evaluations": state["evaluations"],
    }


def _write_adapter(prepared: Prepared, checkpoint: Path) -> None:
    from s2s_ray.pipelines.finetune_worker import write_adapter

    preset = presets.resolve(prepared.settings.preset, expected_digest=prepared.preset_digest).directory
    with tempfile.TemporaryDirectory() as name:
        write_adapter(checkpoint, preset, prepared.settings, Path(name))
        for path in sorted(Path(name).iterdir()):
            (prepared.output / "adapter" / path.name).upload(path)


def validation_sample(units: Sequence[Unit], job: TokenJob) -> list[list[str] | None]:
    """[sources, references, source languages, target languages]: up to `evaluate_rows` usable pairs, from units spread
    evenly over the validation data; None where languages have no column.
    """
    settings = job.settings
    chosen = units[:: max(1, len(units) // 8)]
    rows: list[tuple[Any, ...]] = []
    for number, unit in enumerate(chosen, start=1):
        for pairs in read_pairs(unit, settings):
            none = [None] * len(pairs.sources)
            columns = pairs.sources, pairs.targets, pairs.source_lang or none, pairs.target_lang or none
            known = [not route.error for route in routes_of(pairs, job.preprocessor())]
            together = zip(known, zip(*columns, strict=True), strict=True)
            usable = [row for is_known, row in together if is_known and _is_text(row[0]) and _is_text(row[1])]
            rows += usable[: settings.evaluate_rows * number // len(chosen) - len(rows)]
    sources, references = ([row[i].decode() for row in rows] for i in (0, 1))
    named = (settings.source_lang_column, settings.target_lang_column)
    languages = [None if name is None else [row[i] for row in rows] for i, name in enumerate(named, start=2)]
    return [sources, references, *languages]


def _is_text(value: bytes | None) -> bool:
    if value is None or not value.strip():
        return False
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def train_on_worker(config: dict[str, Any], device: "torch.device", emit: Callable[[Event], None]) -> None:
    """Build this worker's part of the run and train. Needs Ray Train only for the place on the node."""
    from ray import train

    from s2s_ray.pipelines import finetune_worker as worker

    settings = FinetuneSettings(**config["settings"])
    worker.train(config, settings, device, train.get_context().get_local_rank(), emit)


def _describe(prepared: Prepared) -> tuple[str, ...]:
    settings = prepared.settings
    rows = sum(unit.rows for unit in prepared.units)
    passes = max(1, settings.batch_tokens // settings.micro_batch_tokens)
    return (
        f"{rows} pairs of {len(settings.input)} inputs, {sum(u.rows for u in prepared.validation_units)} to validate",
        f"a step: {_counted(passes, 'forward pass', 'es')} of at most {settings.micro_batch_tokens} tokens over "
        f"{_counted(settings.num_workers, 'worker', 's')}",
        f"fingerprint {prepared.ledger.fingerprint}; nothing was written",
    )


def _counted(number: int | str, noun: str, plural: str) -> str:
    return f"{number} {noun}{'' if str(number) == '1' else plural}"


def _store_and_name(publish: str) -> tuple[str, str]:
    store, _, name = publish.rstrip("/").rpartition("/")
    if not store or not presets.handles.PRESET_NAME.fullmatch(name):
        raise SettingsError(f"--publish must be STORE/NAME, such as s3://bucket/store/my_model. Received: {publish!r}")
    return store, name


def _publish(output: Location, publish: str | None) -> str | None:
    """Publish the run's preset to a store; returns its handle there."""
    if publish is None:
        return None
    store, name = _store_and_name(publish)
    directory: Path = presets.resolve((output / "preset").url).directory
    version = presets.PresetStore(store).publish(directory, name)
    return f"{Location.parse(store).url}/{version}"
