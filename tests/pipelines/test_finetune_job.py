"""The fine-tuning job on a real local Ray: trained, hit by a kill, published, and generated from."""

import dataclasses
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import loop_run
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from s2s_ray import Seq2SeqLM
from s2s_ray.errors import ErrorRateExceededError, FingerprintError, InputError
from s2s_ray.pipelines import evaluate, finetune
from s2s_ray.pipelines.evaluate import EvaluateSettings
from s2s_ray.pipelines.finetune import run
from s2s_ray.pipelines.finetune_report import TrainingProgress
from s2s_ray.pipelines.finetune_settings import FinetuneSettings
from s2s_ray.training.distributed import World
from s2s_ray.training.vocabulary import extend_vocabulary

ROWS, STEPS = 60, 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, english_text: list[str]) -> Path:
    """Pairs of texts: `train` with one null among them, and `valid`."""
    directory = tmp_path_factory.mktemp("pairs")
    texts: list[str | None] = [*english_text[:ROWS]]
    targets = [" ".join(str(text).split()[: 2 + i % 5]) for i, text in enumerate(texts)]
    texts[7] = None
    for name, rows in (("train", slice(0, 50)), ("valid", slice(50, ROWS))):
        table = pa.table({"text": pa.array(texts[rows], pa.string()), "summary": targets[rows]})
        pq.write_table(table, directory / f"{name}.parquet", row_group_size=20)
    return directory


@pytest.fixture
def settings(data: Path, tiny_bart_dir: Path, tmp_path: Path) -> FinetuneSettings:
    return FinetuneSettings(
        input=(str(data / "train.parquet"),),
        validation_input=(str(data / "valid.parquet"),),
        output=str(tmp_path / "out"),
        preset=str(tiny_bart_dir),
        max_source_length=64,
        max_steps=STEPS,
        batch_tokens=400,
        micro_batch_tokens=100,
        learning_rate=1e-3,
        log_every=1,
        checkpoint_every=8,
        metrics=("rougeL", "bleu"),
        max_error_rate=0.05,
        num_workers="2",
        cpus_per_worker=0.5,
        log_to=("tensorboard",),
        publish=str(tmp_path / "store" / "tiny"),
    )


def pairs_of(path: Path, preset: Path) -> list[list[list[int]]]:
    rows = [row for row in pq.read_table(path).to_pylist() if row["text"] is not None]
    preprocessor = Seq2SeqLM.from_preset(preset).preprocessor
    sources, _ = preprocessor.encode_sources([row["text"] for row in rows], 64)
    return [list(pair) for pair in zip(sources, preprocessor.encode_targets([r["summary"] for r in rows]), strict=True)]


class KillingProgress(TrainingProgress):
    """Kills a worker once, in the step after the first checkpoint."""

    pids: ClassVar[list[int]] = []

    def show(self, event: Mapping[str, Any]) -> None:
        super().show(event)
        if event["kind"] == "start":
            self.pids.append(event["pids"][-1])
        elif event["step"] == 10 and len(self.pids) == 1:
            os.kill(self.pids[0], signal.SIGKILL)


def test_train_kill_publish_generate_evaluate(
    settings: FinetuneSettings,
    data: Path,
    tiny_bart_dir: Path,
    tmp_path: Path,
    local_ray: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = Path(settings.output)
    monkeypatch.setattr(finetune, "TrainingProgress", KillingProgress)
    settings = dataclasses.replace(settings, new_tokens=("<new>",))
    report = run(settings)
    assert len(set(KillingProgress.pids)) == 2
    assert (report.steps, report.pairs, report.skipped) == (STEPS, 49, {"NULL_TEXT": 1})
    saved = json.loads((output / "report.json").read_text())
    assert all(0 < entry["mfu"] < 1 for entry in saved["log"])
    assert (output / "report.svg").read_text().count("<polyline") == 2
    assert len(list((output / "tensorboard").iterdir())) == 2  # one an attempt

    start = tmp_path / "extended"
    extend_vocabulary(tiny_bart_dir, ["<new>"], start)
    spec = {
        "preset": str(start),
        "checkpoints": str(tmp_path / "reference"),
        "rows": pairs_of(data / "train.parquet", start),
        "validation": {"examples": pairs_of(data / "valid.parquet", start)},
        "settings": {
            "optimizer": {
                "name": "adamw", "learning_rate": 1e-3, "schedule": "linear", "weight_decay": 0.01, "clip_norm": 1.0
            },
            "epochs": None, "max_steps": STEPS, "batch_tokens": 400, "micro_batch_tokens": 100,
            "log_every": 1, "checkpoint_every": 8,
        },
    }  # fmt: skip
    expected = loop_run.run(spec, World(0, 1, torch.device("cpu")))
    assert [e["loss"] for e in saved["log"]] == pytest.approx([e["loss"] for e in expected.log], rel=1e-5)
    assert [e["val_loss"] for e in saved["evaluations"]] == pytest.approx(
        [e["val_loss"] for e in expected.evaluations], rel=1e-5
    )
    assert [e["step"] for e in saved["evaluations"]] == [8, 16, 24]
    assert set(saved["evaluations"][0]["signatures"]) == {"rougeL", "bleu"}
    assert report.preset_step == expected.best_step() and report.published == f"{tmp_path / 'store'}/tiny@1"

    again = run(dataclasses.replace(settings, num_workers="1"))
    assert (again.steps, again.published) == (STEPS, report.published)
    with pytest.raises(FingerprintError, match=r"learning_rate was 0\.001, now 0\.002"):
        run(dataclasses.replace(settings, learning_rate=0.002))

    evaluation = evaluate.run(
        EvaluateSettings(
            input=(str(data / "valid.parquet"),),
            output=str(tmp_path / "evaluation"),
            preset=report.published,
            summary_column="answer",
            reference_column="summary",
            metrics=("rougeL", "bleu"),
            max_target_length=8,
        )
    )
    assert (evaluation.answers.rows, evaluation.answers.error_rows) == (ROWS - 50, 0)
    assert evaluation.figures["rows"] == ROWS - 50 and set(evaluation.figures["scores"]) == {"rougeL", "bleu"}
    assert Seq2SeqLM.from_preset(report.published).preprocessor.encode_sources(["<new>"])[0][0][1:-1] == [
        Seq2SeqLM.from_preset(tiny_bart_dir).backbone.vocabulary_size
    ]


def test_unusable_data_is_refused_before_training(
    settings: FinetuneSettings, data: Path, tmp_path: Path, local_ray: None
) -> None:
    with pytest.raises(InputError, match=r"--summary-column must name one text column of every file of --input"):
        run(dataclasses.replace(settings, summary_column="target"))
    with pytest.raises(ErrorRateExceededError, match=r"1 of 50: \{'NULL_TEXT': 1\}"):
        run(dataclasses.replace(settings, max_error_rate=0.0))
    plan = str(run(dataclasses.replace(settings, output=str(tmp_path / "dry"), dry_run=True)))
    assert "50 pairs of 1 inputs, 10 to validate" in plan and not (tmp_path / "dry").exists()
