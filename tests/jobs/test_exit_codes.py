"""What a user sees when something is wrong: one line and an exit code, before any model loads."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from job_helpers import ROOT, job_environment, write_input

from s2s_ray.pipelines import command
from s2s_ray.presets.manifest import seal

JOBS = {
    name: runpy.run_path(str(ROOT / "jobs" / f"{name}.py")) for name in ("summarize", "generate", "verify", "clean")
}


def outcome(name: str, *arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """(exit code, stderr)"""
    job = JOBS[name]["main" if name in ("verify", "clean") else name]
    with pytest.raises(SystemExit) as caught:
        command.main(job, arguments)
    return int(caught.value.code or 0), capsys.readouterr().err


@pytest.fixture
def inputs(tmp_path: Path) -> str:
    write_input(tmp_path / "in", ["one", "two", None], files=1)
    return str(tmp_path / "in")


@pytest.mark.parametrize(
    "changes,code,message",
    [
        (["--text-column", "body"], 2, "'body'"),
        (["--text-column", "id"], 2, "of type int64"),
        (["--input", "no/such/folder"], 2, "Nothing was found"),
        (["--input", "s3://key:secret@bucket/x"], 2, "credentials in a URL are refused"),
        (["--preset", "no_such_preset"], 2, "no_such_preset"),
        (["--summary-column", "tags"], 2, "must not clash"),
        (["--num-beams", "0"], 2, "--num-beams must be at least 1"),
        (["--num-replicas", "8:2"], 2, "--num-replicas must be"),
        (["--temperature", "0.5"], 2, "--temperature needs --sampler"),
        (["--config", "no.toml"], 2, "readable TOML file"),
        (["--on-long", "split"], 2, "without --segment sentence"),
    ],
)
def test_one_clear_line(
    changes: list[str], code: int, message: str, inputs: str, tiny_bart_dir: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    flags = ["--input", inputs, "--output", str(tmp_path / "out"), "--preset", str(tiny_bart_dir)]
    if changes[0] == "--input":
        flags = flags[2:]
    found, error = outcome("generate", *flags, *changes, capsys=capsys)
    assert found == code and message in error and "Traceback" not in error and "secret" not in error
    assert error.count("\n") == 1 or "usage:" in error
    assert not (tmp_path / "out").exists()


def test_unreadable_footer(
    inputs: str, tiny_bart_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(inputs) / "broken.parquet").write_bytes(b"PAR1 not really PAR1")
    flags = ["--input", inputs, "--output", str(tmp_path / "out"), "--preset", str(tiny_bart_dir)]
    code, error = outcome("generate", *flags, capsys=capsys)
    assert code == 2 and "broken.parquet" in error and "--skip-bad-files" in error
    command_line = [*flags, "--skip-bad-files", "--dry-run"]
    assert outcome("generate", *command_line, capsys=capsys)[0] == 0


def test_tampered_preset(inputs: str, tiny_bart_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset = tmp_path / "preset"
    shutil.copytree(tiny_bart_dir, preset)
    seal(preset)
    flags = ["--input", inputs, "--output", str(tmp_path / "out"), "--preset", str(preset), "--dry-run"]
    assert outcome("generate", *flags, capsys=capsys)[0] == 0
    weights = bytearray((preset / "model.safetensors").read_bytes())
    weights[-100] ^= 1
    (preset / "model.safetensors").write_bytes(weights)
    code, error = outcome("generate", *flags, capsys=capsys)
    assert code == 7 and "model.safetensors" in error


def test_output_of_other_settings(
    inputs: str, tiny_bart_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from s2s_ray.pipelines.generate import prepare
    from s2s_ray.pipelines.settings import parse

    flags = ["--input", inputs, "--output", str(tmp_path / "out"), "--preset", str(tiny_bart_dir)]
    prepared = prepare(parse(flags, "", {}))
    prepared.ledger.claim(prepared.document)
    code, error = outcome("generate", *flags, "--seed", "5", "--min-length", "3", capsys=capsys)
    assert code == 5 and "min_length was None, now 3; seed was 0, now 5" in error


def test_verify_and_clean_need_a_finished_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for job in ("verify", "clean"):
        code, error = outcome(job, str(tmp_path), capsys=capsys)
        assert code == 8 and "must hold _manifest.json" in error


def test_scripts_are_thin_and_open_with_commands() -> None:
    for path in (ROOT / "jobs").glob("*.py"):
        lines = path.read_text().splitlines()
        assert len(lines) <= 60 and any(line.startswith(f"    python jobs/{path.name}") for line in lines[:8]), path


def test_binary_text(tiny_bart_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"text": pa.array([b"one", b"\xff"], pa.binary())}), tmp_path / "in.parquet")
    flags = ["--input", str(tmp_path / "in.parquet"), "--output", str(tmp_path / "out"), "--preset", str(tiny_bart_dir)]
    assert outcome("generate", *flags, "--dry-run", capsys=capsys)[0] == 0


def test_a_ray_that_cannot_start(tmp_path: Path) -> None:
    """Ray raises errors of many types then, bare Exceptions among them; they are all 75."""
    (tmp_path / "file").touch()
    program = (
        "from s2s_ray.errors import InfrastructureError\n"
        "from s2s_ray.pipelines.cluster import ray_session\n"
        "try:\n    with ray_session(None): pass\n"
        "except InfrastructureError as error: print(error.exit_code, error)"
    )
    environment = job_environment(RAY_TMPDIR=str(tmp_path / "file"))  # no place for Ray's session directory
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.startswith("75 Ray could not be reached at local: "), done.stderr
