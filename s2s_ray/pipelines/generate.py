"""The generate job: Parquet in, Parquet with generated text out, exactly once and resumably.

A row's way: inputs.py (files, footers) -> plan.py (units) -> rows.py `read_unit` -> replica.py (the model) -> rows.py
`make_shard` -> ledger.py (commit) -> publish.py. This file strings them together, with Ray Data in the middle.
"""

import dataclasses
import uuid
from collections.abc import Iterator
from functools import partial
from typing import Any

from s2s_ray import presets
from s2s_ray.errors import ErrorRateExceededError, LanguageError
from s2s_ray.pipelines import plan as planning
from s2s_ray.pipelines.cluster import Resources, execute, ray_session
from s2s_ray.pipelines.inputs import InputFile, find_files, output_schema, read_footers
from s2s_ray.pipelines.lease import Lease
from s2s_ray.pipelines.ledger import Ledger, check_claim
from s2s_ray.pipelines.plan import Plan, Unit
from s2s_ray.pipelines.progress import Progress
from s2s_ray.pipelines.publish import build_manifest, finished, publish, publish_mode
from s2s_ray.pipelines.report import RunReport, make_report
from s2s_ray.pipelines.rows import Job, from_ipc, make_shard, read_unit, to_ipc
from s2s_ray.pipelines.settings import GenerateSettings
from s2s_ray.storage import Location
from s2s_ray.text.preprocessor import Seq2SeqLMPreprocessor

NEED_A_TARGET = ("target_token", "source_first", "source_last")  # conventions (text/languages.py) without a default


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run that was found to be possible; nothing is written yet."""

    settings: GenerateSettings
    output: Location
    files: list[InputFile]
    document: dict[str, Any]
    plan: Plan
    preset_digest: str

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.output, planning.fingerprint(self.document))


def run(settings: GenerateSettings) -> RunReport:
    """Run the job, or resume it, or find it complete. Raises an S2SRayError whose exit code is the job's."""
    prepared = prepare(settings)
    output, ledger = prepared.output, prepared.ledger
    if settings.dry_run:
        lines = planning.describe(prepared.plan, prepared.files, ledger.fingerprint)
        done = len(ledger.committed())
        return RunReport(output.url, 0, 0, {}, plan=(*lines, f"{done} units committed already; nothing was written"))
    manifest = finished(ledger)
    if manifest is not None:
        return make_report(output, settings, manifest)
    ledger.claim(prepared.document)
    with Lease(ledger.work) as lease:
        plan = ledger.store_plan(prepared.plan)
        totals = _generate(dataclasses.replace(prepared, plan=plan), lease)
        mode = publish_mode(output, settings.publish)
        manifest = build_manifest(ledger, plan, prepared.document, mode)
        check_error_rate(manifest["error_rows"], plan.rows, settings)
        publish(ledger, manifest)
    return make_report(output, settings, manifest, **totals)


def prepare(settings: GenerateSettings) -> Prepared:
    """Find out whether the run is possible, cheapest checks first; no model is loaded.

    Raises InputError, PresetError, PresetIntegrityError or FingerprintError.
    """
    output = Location.parse(settings.output)
    settings = dataclasses.replace(settings, output=output.url, preset=presets.absolute(settings.preset))
    if settings.draft_preset is not None:
        draft = presets.absolute(settings.draft_preset)
        presets.resolve(draft)
        settings = dataclasses.replace(settings, draft_preset=draft)
    files = find_files(settings.input, output)
    preset = presets.resolve(settings.preset)
    document = planning.document(settings, files, preset.digest)
    ledger = Ledger(output, planning.fingerprint(document))
    plan = ledger.stored_plan() if check_claim(output, document) else None
    if plan is None:
        footers, skipped = read_footers(files, settings.skip_bad_files)
        schema = output_schema(footers, settings)
        plan = Plan(planning.cut(footers, settings.rows_per_unit), schema, skipped)
    preprocessor = Seq2SeqLMPreprocessor.from_directory(preset.directory, **settings.preprocessing())
    preprocessor.try_encode_sources([], settings.max_source_length)  # refuses a limit that holds no text
    _check_languages(preprocessor, settings)
    return Prepared(settings, output, files, document, plan, preset.digest)


def check_error_rate(error_rows: int, rows: int, settings: GenerateSettings) -> None:
    """Raises ErrorRateExceededError. Committed rows stay: a rerun with a higher rate publishes them."""
    if error_rows > settings.max_error_rate * rows:
        raise ErrorRateExceededError(
            f"at most {settings.max_error_rate:.4g} of the rows may fail (--max-error-rate). Received: {error_rows} of "
            f"{rows} ({error_rows / rows:.1%}). Nothing was published; what is committed is kept, and a rerun with a "
            "higher rate goes on from it"
        )


def _generate(prepared: Prepared, lease: Lease) -> dict[str, Any]:
    """Run every unit that has no commit record yet; returns what this run did."""
    settings, plan = prepared.settings, prepared.plan
    committed = prepared.ledger.committed()
    missing = [unit for unit in plan.units if unit.id not in committed]
    done_before = plan.rows - sum(unit.rows for unit in missing)
    if not missing:
        return {}
    job = Job(settings, prepared.preset_digest, prepared.ledger.fingerprint, plan.schema, uuid.uuid4().hex[:12])
    with ray_session(settings.address):
        progress = Progress(plan.rows, done_before)
        try:
            for result in run_units(missing, job):
                progress.update(result["rows"], result["error_rows"], result["num_tokens"])
                check_error_rate(progress.errors, plan.rows, settings)
                if lease.lost:
                    lease.check()
        finally:
            progress.close()
    return {"rows_generated": progress.rows, "tokens_generated": progress.tokens, "seconds": progress.seconds}


def run_units(units: list[Unit], job: Job) -> Iterator[dict[str, Any]]:
    """Read, generate and commit these units on the cluster; yields a small result for each as it commits."""
    import ray

    from s2s_ray.pipelines.replica import Replica

    rows = max(unit.rows for unit in units)
    resources = Resources.of(job.settings, ray.cluster_resources(), len(ray.nodes()), rows)
    items = [{"unit": unit.id, "descriptor": unit.encode()} for unit in units]
    dataset = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map(partial(read_stage, job=job), num_cpus=resources.task_cpus)
        .map_batches(
            Replica,
            fn_constructor_kwargs={"job": job, "num_threads": resources.threads},
            batch_format="pyarrow",
            batch_size=1,
            compute=resources.pool(),
            num_cpus=resources.replica_cpus,
            num_gpus=resources.replica_gpus or None,
        )
        .map(partial(commit_stage, job=job), num_cpus=resources.task_cpus)
    )
    yield from execute(dataset, job.settings.stall_timeout)


def read_stage(row: dict[str, Any], job: Job) -> dict[str, Any]:
    """A unit's descriptor to its rows, tokenised. Runs as a CPU task."""
    work, carried = read_unit(Unit.decode(row["descriptor"]), job)
    return {**row, "work": to_ipc(work), "carried": to_ipc(carried)}


def commit_stage(row: dict[str, Any], job: Job) -> dict[str, Any]:
    """A unit's answers to committed shards. Runs as a CPU task."""
    unit = Unit.decode(row["descriptor"])
    work, carried, answers = (from_ipc(row[name]) for name in ("work", "carried", "answers"))
    shard = make_shard(unit, work, carried, answers, row["attempts"], job)
    commit = job.ledger.commit(unit.id, unit.rows, shard)
    return {
        "unit": unit.id,
        "rows": unit.rows,
        "error_rows": commit.error_rows,
        "num_tokens": commit.num_tokens,
    }


def _check_languages(preprocessor: Seq2SeqLMPreprocessor, settings: GenerateSettings) -> None:
    """Raises LanguageError for language columns that the preset has no use for, and for a target that nobody names."""
    languages, columns = preprocessor.languages, settings.language_columns()
    if languages is None:
        if columns:
            raise LanguageError(f"language columns need a preset that has languages. Received: {', '.join(columns)}")
        return
    # Texts that say their target themselves (">>de<< ...") are possible, but not once they are cut.
    named = preprocessor.target_lang or settings.target_lang_column or settings.source_prefix
    if settings.segment == "sentence" and not named and languages.convention in NEED_A_TARGET:
        raise LanguageError(
            "--target-lang, or --target-lang-column, must say what to translate to. Known: "
            f"{', '.join(sorted(languages.tokens))}"
        )
