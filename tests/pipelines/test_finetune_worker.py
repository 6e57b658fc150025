"""A worker's part of the job without Ray: from tokenised files to checkpoints, with languages, weights and LoRA."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from s2s_ray import Seq2SeqLM, presets
from s2s_ray.nn.lora import load_adapter
from s2s_ray.pipelines import finetune_worker
from s2s_ray.pipelines.finetune import validation_sample
from s2s_ray.pipelines.finetune_settings import FinetuneSettings
from s2s_ray.pipelines.inputs import find_files
from s2s_ray.pipelines.tokens import TokenJob, cut_inputs, tokenise_unit
from s2s_ray.storage import Location
from s2s_ray.training.checkpoint import Checkpoints, read_state


@pytest.fixture
def settings(tiny_bart_dir: Path, english_text: list[str], tmp_path: Path) -> FinetuneSettings:
    preset = tmp_path / "preset"
    shutil.copytree(tiny_bart_dir, preset)
    languages = {"convention": "start_token", "tokens": {"en": "<mask>", "de": "<unk>"}}
    (preset / "preprocessor.json").write_text(json.dumps({"languages": languages}))
    for name, start, rows in (("a", 0, 20), ("b", 20, 10), ("valid", 30, 6)):
        texts = english_text[start : start + rows]
        targets = [" ".join(text.split()[:4]) for text in texts]
        columns = {"text": texts, "summary": targets, "to": ["en", "de"] * (rows // 2)}
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    return FinetuneSettings(
        input=(str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")),
        validation_input=(str(tmp_path / "valid.parquet"),),
        output=str(tmp_path / "out"),
        preset=str(preset),
        source_lang="en",
        target_lang_column="to",
        input_weights=("1", "2"),
        max_source_length=48,
        max_target_length=12,
        max_steps=6,
        batch_tokens=300,
        micro_batch_tokens=150,
        learning_rate=1e-2,
        log_every=2,
        checkpoint_every=3,
        evaluate_rows=4,
        metrics=("rougeL",),
        lora_rank=2,
        lora_targets=("q_proj", "fc1"),
        dropout=0.0,
        label_smoothing=0.1,
        optimizer="adafactor",
    )


def config_of(settings: FinetuneSettings) -> dict[str, Any]:
    """What pipelines/finetune.py gives to the workers, its CPU tasks done here."""
    digest = presets.resolve(settings.preset).digest
    output = Location.parse(settings.output)
    job = TokenJob(settings, digest, output / "tokens")
    data: dict[str, Any] = {}
    units = {}
    for name, paths in (("train", settings.input), ("validation", settings.validation_input or ())):
        units[name], _ = cut_inputs([find_files([path], output) for path in paths], settings, name)
        results = [json.loads(tokenise_unit({"descriptor": u.encode()}, name, job)["result"]) for u in units[name]]
        files = [f"{name}-u{unit.id:08d}.arrow" for unit in units[name]]
        data[name] = {"files": files, "inputs": [result["pairs"] for result in results]}
    return {
        "settings": dataclasses.asdict(settings),
        "preset_digest": digest,
        "tokens": job.directory.url,
        "data": data,
        "sample": validation_sample(units["validation"], job),
    }


def test_a_worker_trains_evaluates_and_saves(settings: FinetuneSettings, tmp_path: Path) -> None:
    config = config_of(settings)
    assert config["data"]["train"]["inputs"] == [20, 10] and config["sample"][3] == ["en", "de", "en", "de"]
    events: list[dict[str, Any]] = []
    finetune_worker.train(config, settings, torch.device("cpu"), 0, events.append)
    kinds = [event["kind"] for event in events]
    assert kinds.count("log") == 4 and kinds.count("evaluation") == 2  # steps 2, 3, 4, 6
    checkpoints = Checkpoints(Location.parse(settings.output) / "checkpoints")
    saved = checkpoints.fetch(6)
    state = read_state(saved)
    assert [entry["step"] for entry in state["evaluations"]] == [3, 6]
    assert set(state["evaluations"][0]) == {"step", "val_loss", "rougeL", "signatures"}
    assert state["log"][0]["learning_rate"] == pytest.approx(1e-2 * 5 / 6)  # the second of six steps, linear to zero

    (tmp_path / "adapter").mkdir()
    finetune_worker.write_adapter(saved, Path(settings.preset), settings, tmp_path / "adapter")
    beside = Seq2SeqLM.from_preset(settings.preset)
    assert load_adapter(beside.backbone, tmp_path / "adapter").targets == ("fc1", "q_proj")
    merged = Seq2SeqLM.from_preset(saved)
    assert merged.preprocessor.source_lang == "en"
    texts = [f"a text of number {i}" for i in range(4)]
    ours = [task.score(texts, texts, target_lang="de", source_lang="en") for task in (merged, beside)]
    assert ours[0] == pytest.approx(ours[1], rel=1e-4)
    assert ours[0] != pytest.approx(
        Seq2SeqLM.from_preset(settings.preset).score(texts, texts, target_lang="de"), rel=1e-3
    )
