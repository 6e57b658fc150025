"""The curve of a run is one, whatever trains it: one worker or two, DDP or FSDP2, in one go or with interruptions."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import loop_run
import pytest
import torch

from s2s_ray import Seq2SeqLM
from s2s_ray.training.distributed import World

STEPS = 50
SETTINGS = {
    "optimizer": {"name": "adamw", "learning_rate": 1e-3, "schedule": "linear", "warmup_steps": 5, "clip_norm": 1.0},
    "epochs": None,
    "max_steps": STEPS,
    "batch_tokens": 800,
    "micro_batch_tokens": 200,
    "log_every": 1,
    "checkpoint_every": 20,
    "seed": 3,
}
Spec = dict[str, Any]


@pytest.fixture(scope="session")
def rows(tiny_bart_dir: Path, pairs: dict[str, list[str]]) -> list[list[list[int]]]:
    preprocessor = Seq2SeqLM.from_preset(tiny_bart_dir).preprocessor
    sources, _ = preprocessor.encode_sources(pairs["encoder_text"], 64)
    return [list(pair) for pair in zip(sources, preprocessor.encode_targets(pairs["decoder_text"]), strict=True)]


@pytest.fixture(scope="session")
def spec(tiny_bart_dir: Path, rows: list[list[list[int]]], tmp_path_factory: pytest.TempPathFactory) -> Spec:
    directory = tmp_path_factory.mktemp("whole") / "checkpoints"
    return {"preset": str(tiny_bart_dir), "checkpoints": str(directory), "rows": rows, "settings": SETTINGS}


@pytest.fixture(scope="session")
def whole(spec: Spec) -> loop_run.Loop:
    """One worker, in one go."""
    torch.set_num_threads(1)
    return loop_run.run(spec, World(0, 1, torch.device("cpu")))


def changed(spec: Spec, directory: Path, stop_at: int | None = None, **settings: Any) -> Spec:
    return spec | {"checkpoints": str(directory), "settings": spec["settings"] | settings, "stop_at": stop_at}


def run_workers(specs: list[Spec], directory: Path, size: int = 2) -> list[dict[str, Any]]:
    """The runs, one after another, on `size` workers over gloo."""
    path = directory / "runs.json"
    path.write_text(json.dumps(specs))
    environment = {**os.environ, "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, loop_run.__file__, str(path)]
    workers = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(size)
    ]
    errors = [worker.communicate(timeout=280)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * size, errors
    return json.loads(path.with_suffix(".json.out").read_text())


def curve(log: list[dict[str, Any]]) -> list[float]:
    return [entry["loss"] for entry in log]


def test_two_workers_follow_the_curve_of_one(spec: Spec, whole: loop_run.Loop, tmp_path: Path) -> None:
    expected = curve(whole.log)
    assert len(expected) == STEPS and expected[-1] < 0.85 * expected[0]
    fsdp = {"strategy": "fsdp", "checkpoint_every": 3}
    stops = [changed(spec, tmp_path / "fsdp", stop_at=stop, **fsdp) for stop in (4, 7)]
    runs = run_workers([changed(spec, tmp_path / "ddp", stop_at=15, checkpoint_every=STEPS), *stops], tmp_path)
    assert [run["start"] for run in runs] == [0, 0, 3]
    assert curve(runs[0]["log"]) == pytest.approx(expected[:15], rel=1e-5)
    assert curve(runs[2]["log"]) == pytest.approx(expected[:7], rel=1e-5)


@pytest.mark.full
def test_fifty_steps_on_two_workers_and_a_change_of_strategy(spec: Spec, whole: loop_run.Loop, tmp_path: Path) -> None:
    whole_ddp, whole_fsdp, _, then_ddp = run_workers(
        [
            changed(spec, tmp_path / "ddp"),
            changed(spec, tmp_path / "fsdp", strategy="fsdp"),
            changed(spec, tmp_path / "broken", stop_at=33, strategy="fsdp"),
            changed(spec, tmp_path / "broken"),
        ],
        tmp_path,
    )
    assert then_ddp["start"] == 20
    for run in (whole_ddp, whole_fsdp, then_ddp):
        assert curve(run["log"]) == pytest.approx(curve(whole.log), rel=1e-5)


def test_a_run_that_was_stopped_continues_the_same_curve(spec: Spec, whole: loop_run.Loop, tmp_path: Path) -> None:
    world = World(0, 1, torch.device("cpu"))
    loop_run.run(changed(spec, tmp_path / "broken", stop_at=23), world)
    loop = loop_run.run(changed(spec, tmp_path / "broken", stop_at=28), world)
    assert loop.start == 20
    assert curve(loop.log) == curve(whole.log)[:28]  # bit by bit


def test_average_lora_and_recomputation_resume_bit_by_bit(spec: Spec, tmp_path: Path) -> None:
    """With them the weights that are trained are not those of the checkpoint's preset, which evaluation sees."""
    world = World(0, 1, torch.device("cpu"))
    options = {"max_steps": 12, "checkpoint_every": 5, "average_decay": 0.9, "recompute_activations": True}
    small = spec | {"lora": {"rank": 2, "dropout": 0.1}, "validation": {"examples": spec["rows"][:5]}}
    whole = loop_run.run(changed(small, tmp_path / "whole", **options), world)
    loop_run.run(changed(small, tmp_path / "broken", stop_at=7, **options), world)
    loop = loop_run.run(changed(small, tmp_path / "broken", **options), world)
    assert loop.start == 5 and curve(loop.log) == curve(whole.log)
    assert loop.evaluations == whole.evaluations and [e["step"] for e in whole.evaluations] == [5, 10, 12]

    plain = loop_run.run(changed(small, tmp_path / "plain", **options | {"recompute_activations": False}), world)
    assert curve(plain.log) == pytest.approx(curve(whole.log), rel=1e-6)
    saved = Seq2SeqLM.from_preset(tmp_path / "whole" / "step-00000012").backbone.state_dict()
    started = Seq2SeqLM.from_preset(spec["preset"]).backbone.state_dict()
    moved = {name for name, tensor in saved.items() if not torch.equal(tensor, started[name])}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in moved} == {"query", "value"}
    averaged = whole.average["encoder_layers.0.self_attention.query.lora_b"]
    assert not torch.equal(averaged, whole.trainable["encoder_layers.0.self_attention.query.lora_b"])


def test_training_stops_when_patience_runs_out_and_keeps_the_best(spec: Spec, tmp_path: Path) -> None:
    world = World(0, 1, torch.device("cpu"))
    options = {"max_steps": 40, "checkpoint_every": 2, "patience": 2}
    options["optimizer"] = {"name": "sgd", "learning_rate": 40.0, "clip_norm": 1.0}  # far too large: it gets worse
    small = spec | {"validation": {"examples": spec["rows"][:5]}}
    loop = loop_run.run(changed(small, tmp_path / "a", **options), world)
    losses = [e["val_loss"] for e in loop.evaluations]
    best = loop.best_step()
    assert losses[best // 2 - 1] == min(losses) and loop.log[-1]["step"] == best + 4 < 40
    kept = sorted(int(path.name.removeprefix("step-")) for path in (tmp_path / "a").iterdir())
    assert kept == sorted({best, best + 2, best + 4})
    again = loop_run.run(changed(small, tmp_path / "a", **options), world)
    assert again.start == best + 4 and again.log == loop.log


@pytest.mark.full
def test_two_hundred_steps_follow_transformers(spec: Spec, tmp_path: Path) -> None:
    """AdamW with warm-up and decay, no dropout; the same batches and learning rates in both."""
    from transformers import BartForConditionalGeneration

    optimizer = {"name": "adamw", "learning_rate": 5e-4, "epsilon": 1e-8, "weight_decay": 0.01,
                 "schedule": "linear", "warmup_steps": 20, "clip_norm": 1.0}  # fmt: skip
    options = {"optimizer": optimizer, "max_steps": 200, "batch_tokens": 600, "micro_batch_tokens": 600}
    loop = loop_run.run(
        changed(spec | {"dropout": 0.0}, tmp_path / "ours", **options), World(0, 1, torch.device("cpu"))
    )
    model = BartForConditionalGeneration.from_pretrained(spec["preset"]).eval()
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim >= 2) == matrices], "weight_decay": 0.01 * matrices}
        for matrices in (True, False)
    ]
    adamw = torch.optim.AdamW(groups, lr=5e-4, eps=1e-8)
    losses = []
    for step in range(200):
        (rows,) = loop.steps.rows(step)
        batch = loop.examples.collate(rows)
        output = model(
            input_ids=batch.inputs["encoder_token_ids"],
            attention_mask=batch.inputs["encoder_padding_mask"],
            labels=batch.labels.masked_fill(batch.weights == 0, -100),
        )
        losses.append(output.loss.item())
        for group in adamw.param_groups:
            group["lr"] = loop.log[step]["learning_rate"]
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    assert curve(loop.log) == pytest.approx(losses, rel=1e-3)
