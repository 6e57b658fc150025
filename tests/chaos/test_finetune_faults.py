"""Fine-tuning jobs in processes of their own: a killed driver, an object store, elastic workers. Long: --full."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from job_helpers import JobProcess, kill_all, run_job, wait_for

from s2s_ray import Seq2SeqLM
from s2s_ray.nn.lora import load_adapter
from s2s_ray.storage import Location

pytestmark = [pytest.mark.full, pytest.mark.timeout(1500)]
FLAGS = (
    "--max-steps", "30", "--batch-tokens", "400", "--micro-batch-tokens", "100", "--learning-rate", "0.001",
    "--log-every", "1", "--checkpoint-every", "6", "--max-source-length", "64", "--cpus-per-worker", "0.5",
)  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, english_text: list[str]) -> Path:
    texts = english_text[:50]
    targets = [" ".join(text.split()[: 2 + i % 5]) for i, text in enumerate(texts)]
    path = tmp_path_factory.mktemp("pairs") / "train.parquet"
    pq.write_table(pa.table({"text": texts, "summary": targets}), path, row_group_size=20)
    return path


def curve(report: bytes) -> list[float]:
    return [entry["loss"] for entry in json.loads(report)["log"]]


def test_a_killed_driver_leaves_a_run_that_goes_on(pairs: Path, tiny_bart_dir: Path, tmp_path: Path) -> None:
    common = ("--input", str(pairs), "--preset", str(tiny_bart_dir), *FLAGS)
    code, _, error = run_job("finetune.py", "--output", str(tmp_path / "whole"), *common, timeout=450)
    assert code == 0, error
    broken = tmp_path / "broken"
    job = JobProcess("finetune.py", "--output", str(broken), *common)
    wait_for(lambda: list(broken.glob("checkpoints/step-*/manifest.json")), timeout=400, what="a checkpoint")
    kill_all(job.marker)
    job.kill()
    assert not (broken / "report.json").exists()
    code, _, error = run_job("finetune.py", "--output", str(broken), *common, timeout=450)
    assert code == 0 and "step 0 of 30" not in error, error
    assert curve((broken / "report.json").read_bytes()) == curve((tmp_path / "whole" / "report.json").read_bytes())
    assert {path.name for path in (broken / "checkpoints").iterdir()} == {"step-00000024", "step-00000030"}


def test_lora_to_an_object_store_with_elastic_fsdp_workers(
    pairs: Path, tiny_bart_dir: Path, s3_server: str, tmp_path: Path
) -> None:
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    output = Location.parse(f"{s3_server}/{tmp_path.name}/run")
    code, out, error = run_job(
        "finetune.py", "--input", str(pairs), "--preset", str(tiny_bart_dir), "--output", output.url, *FLAGS,
        "--lora-rank", "2", "--strategy", "fsdp", "--num-workers", "1:2", "--average-decay", "0.9",
        "--publish", f"{s3_server}/{tmp_path.name}/store/tiny", timeout=450,
        S2S_RAY_CACHE=str(tmp_path / "cache"), **aws,
    )  # fmt: skip
    assert code == 0 and f"{tmp_path.name}/store/tiny@1" in out, error
    assert len(curve((output / "report.json").read_bytes())) == 30
    assert set((output / "adapter").list_names()) == {"adapter_config.json", "adapter_model.safetensors"}
    merged = Seq2SeqLM.from_preset((output / "preset").url)
    beside = Seq2SeqLM.from_preset(tiny_bart_dir)
    for name in (output / "adapter").list_names():
        (output / "adapter" / name).download(tmp_path / name)
    load_adapter(beside.backbone, tmp_path)
    texts = ["to test the merged weights", "and those beside them"]
    assert beside.generate(texts, max_new_tokens=8) == merged.generate(texts, max_new_tokens=8)
