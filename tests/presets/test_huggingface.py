"""hf:// through huggingface_hub itself, against a small hub on a loopback port."""

import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from s2s_ray.presets import builtin_names, resolve
from s2s_ray.presets.manifest import Manifest, seal

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The endpoints a snapshot needs: the repository's files at a revision, and each file with its ETag."""

    directory: Path
    requested: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.requested.append(f"{self.command} {path}")
        names = sorted(str(p.relative_to(self.directory)) for p in self.directory.rglob("*") if p.is_file())
        wanted = "/".join(path.split("/")[5:])
        if path in (f"/api/models/org/tiny/revision/{r}" for r in ("main", "v1", COMMIT)):
            siblings = [{"rfilename": name} for name in [*names, "onnx/model.json"]]
            self.answer(200, json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith(f"/api/models/org/tiny/tree/{COMMIT}"):
            files = [{"type": "file", "path": n, "size": (self.directory / n).stat().st_size, "oid": n} for n in names]
            self.answer(200, json.dumps(files).encode())
        elif path.startswith("/org/tiny/resolve/") and wanted in names:
            data = (self.directory / wanted).read_bytes()
            etag = Manifest.of_directory(self.directory).digest[:16] + wanted.replace(".", "").replace("/", "")
            self.answer(200, data, ETag=f'"{etag}"', **{"X-Repo-Commit": COMMIT})
        elif path.startswith("/api/models/org/tiny/"):
            self.answer(404, b"{}", **{"X-Error-Code": "RevisionNotFound"})
        else:
            self.answer(404, b"{}", **{"X-Error-Code": "RepoNotFound"})

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        return


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[type[Hub]]:
    handler = type("TestHub", (Hub,), {"directory": tmp_path / "repository", "requested": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    server.server_close()


def resolve_elsewhere(handle: str, hub: type[Hub], home: Path, **environment: str) -> dict[str, str]:
    """`presets.resolve` in a process of its own, as huggingface_hub reads its environment when imported."""
    code = (
        "import json, sys; from s2s_ray import presets; from s2s_ray.errors import S2SRayError\n"
        "try:\n    r = presets.resolve(sys.argv[1])\n"
        "    print(json.dumps({'directory': str(r.directory), 'digest': r.digest}))\n"
        "except S2SRayError as e:\n    print(json.dumps({'error': type(e).__name__, 'message': str(e)}))\n"
    )
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}  # type: ignore[attr-defined]
    process = subprocess.run(
        [sys.executable, "-c", code, handle],
        env=os.environ | settings | environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    return dict(json.loads(process.stdout.splitlines()[-1]))


@pytest.fixture
def repository(tmp_path: Path, make_preset: Any) -> Path:
    directory: Path = make_preset(1).rename(tmp_path / "repository")
    (directory / "pytorch_model.bin").write_bytes(b"never fetched")
    (directory / "modeling.py").write_text("never fetched")
    return directory


def test_download_then_offline(hub: type[Hub], repository: Path, tmp_path: Path) -> None:
    result = resolve_elsewhere("hf://org/tiny@v1", hub, tmp_path / "home")
    assert result["digest"] == Manifest.of_directory(repository).digest
    fetched = {p.name for p in Path(result["directory"]).iterdir()}
    assert fetched == {p.name for p in repository.iterdir()} - {"pytorch_model.bin", "modeling.py"}
    assert not any(name in request for request in hub.requested for name in (".bin", ".py", "onnx/"))
    offline = resolve_elsewhere("hf://org/tiny@v1", hub, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert offline == result
    assert resolve_elsewhere(f"hf://org/tiny@{COMMIT}", hub, tmp_path / "home")["digest"] == result["digest"]


def test_a_sealed_repository_is_verified(hub: type[Hub], repository: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "modeling.py"):
        (repository / name).unlink()
    digest = seal(repository).digest
    result = resolve_elsewhere("hf://org/tiny", hub, tmp_path / "home")
    assert result["digest"] == digest
    (repository / "config.json").write_text('{"tampered": 1}')
    assert resolve_elsewhere("hf://org/tiny", hub, tmp_path / "home2")["error"] == "PresetIntegrityError"


def test_a_keras_hub_repository(hub: type[Hub], tmp_path: Path) -> None:
    with zipfile.ZipFile(Path(__file__).parent / "keras_hub" / "bart.zip") as archive:
        archive.extractall(tmp_path)
    local = (tmp_path / "preset").rename(tmp_path / "repository")
    (local / "task.weights.h5").write_bytes(b"never fetched")
    assert resolve_elsewhere("hf://org/tiny", hub, tmp_path / "home")["digest"] == resolve(local).digest
    assert not any("task.weights" in request for request in hub.requested)


def test_what_is_missing_and_what_is_unreachable(hub: type[Hub], repository: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert resolve_elsewhere("hf://org/none", hub, home)["error"] == "PresetError"
    assert resolve_elsewhere("hf://org/tiny@none", hub, home)["error"] == "PresetError"
    assert resolve_elsewhere("hf://org/tiny", hub, home, HF_HUB_OFFLINE="1")["error"] == "InfrastructureError"
    refused = resolve_elsewhere("hf://org/tiny", hub, home, HF_ENDPOINT="http://127.0.0.1:9")
    assert refused["error"] == "InfrastructureError"


def test_kerashubs_names_are_public_repositories() -> None:
    handles = {name: metadata.get("handle") for name, metadata in builtin_names().items()}
    assert handles["bart_base_en"] == "hf://facebook/bart-base"
    assert handles["bart_large_en"] == "hf://facebook/bart-large"
    assert handles["bart_large_en_cnn"] == "hf://facebook/bart-large-cnn"
