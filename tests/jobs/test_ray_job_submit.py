"""`ray job submit --working-dir .` to a cluster with token authentication: the job runs, the wrong token is refused."""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from checker import check
from job_helpers import MARKER, ROOT, job_environment, kill_all, write_input

RAY = str(Path(sys.executable).parent / "ray")
ROWS = 20


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def home_with_token(directory: Path, token: str) -> dict[str, str]:
    """The environment of a user whose ~/.ray/auth_token holds `token`; the package is not on its path."""
    (directory / ".ray").mkdir(parents=True)
    (directory / ".ray" / "auth_token").write_text(token)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the entrypoint says "python"
    marker = {MARKER: secrets.token_hex(8)}
    environment = job_environment(HOME=str(directory), RAY_AUTH_MODE="token", PATH=path, **marker)
    del environment["PYTHONPATH"]
    return environment


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """(address, environment) of a head started with token authentication on ports of its own."""
    environment = home_with_token(tmp_path_factory.mktemp("home"), secrets.token_hex(32))
    names = ["port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port"]
    names += ["runtime-env-agent-port", "metrics-export-port", "ray-client-server-port"]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    with tempfile.TemporaryDirectory(prefix="rs", dir="/tmp") as short:  # Ray's socket paths must stay short
        command = [
            RAY,
            "start",
            "--head",
            "--block",
            "--num-cpus=4",
            "--dashboard-host=127.0.0.1",
            f"--temp-dir={short}",
        ]
        command += [f"--{name}={port}" for name, port in ports.items()]
        head = subprocess.Popen(command, env=environment, cwd=short, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            assert head.stdout is not None
            for line in head.stdout:
                if b"Ray runtime started" in line:
                    break
            else:
                pytest.fail(f"ray start ended with {head.wait()}")
            yield f"http://127.0.0.1:{ports['dashboard-port']}", environment
        finally:
            kill_all(environment[MARKER])  # a polite end takes Ray half a minute
            head.communicate(timeout=60)


def submit(address: str, environment: dict[str, str], *arguments: str) -> tuple[int, str]:
    command = [RAY, "job", "submit", "--address", address, "--working-dir", ".", "--", "python", "jobs/summarize.py"]
    done = subprocess.run(
        [*command, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    return done.returncode, done.stdout + done.stderr


def test_submit_with_exit_codes_and_token(
    cluster: tuple[str, dict[str, str]], english_text: list[str], tiny_bart_dir: Path, tmp_path: Path
) -> None:
    address, environment = cluster
    inputs = write_input(tmp_path / "in", english_text[:ROWS], files=2)
    flags = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--preset", str(tiny_bart_dir)]
    code, out = submit(address, environment, *flags, "--max-target-length", "8")
    assert code == 0 and f"output    {tmp_path / 'out'} ({ROWS} rows)" in out, out[-3000:]
    verdict = check(inputs, str(tmp_path / "out"))
    assert (verdict.rows, verdict.lost, verdict.doubled, verdict.problems) == (ROWS, [], [], [])

    code, out = submit(address, environment, *flags, "--text-column", "body")
    assert code != 0 and "failed with exit code 5" in out, out[-3000:]  # the output is of other settings

    stranger = home_with_token(tmp_path / "stranger", secrets.token_hex(32))
    code, out = submit(address, stranger, *flags)
    assert code != 0 and "Invalid authentication token" in out, out[-3000:]
    nobody = {**stranger, "RAY_AUTH_MODE": "disabled"}
    code, out = submit(address, nobody, *flags)
    assert code != 0, out[-3000:]
