"""kaggle:// through kagglehub itself, against a server on a loopback port that answers as Kaggle's API does."""

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

from s2s_ray import presets

FIXTURE = Path(__file__).parent / "keras_hub" / "bart.zip"
MODEL = {
    "ownerSlug": "keras",
    "modelSlug": "bart",
    "framework": "MODEL_FRAMEWORK_KERAS",
    "instanceSlug": "bart_base_en",
}


class Kaggle(BaseHTTPRequestHandler):
    """The three calls a download makes: the newest version, a version's files, each file."""

    directory: Path
    requested: list[str]

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        call = self.path.removeprefix("/api/v1/models.ModelApiService/")
        self.requested.append(call)
        if not MODEL.items() <= request.items() or request.get("versionNumber", 3) not in (2, 3):
            self.answer(404 if request["ownerSlug"] == "keras" else 503, b'{"message": "no such model"}')
        elif call == "GetModelInstance":
            self.answer(200, json.dumps({"id": 1, "versionNumber": 3}).encode())
        elif call == "ListModelInstanceVersionFiles":
            names = [str(p.relative_to(self.directory)) for p in self.directory.rglob("*") if p.is_file()]
            self.answer(200, json.dumps({"files": [{"name": name} for name in names], "nextPageToken": ""}).encode())
        else:
            assert call == "DownloadModelInstanceVersion"
            self.answer(200, (self.directory / request["path"]).read_bytes())

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        return


@pytest.fixture
def kaggle(tmp_path: Path) -> Iterator[type[Kaggle]]:
    with zipfile.ZipFile(FIXTURE) as archive:
        archive.extractall(tmp_path / "bart")
    handler = type("TestKaggle", (Kaggle,), {"directory": tmp_path / "bart" / "preset", "requested": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    server.server_close()


def resolve_elsewhere(url: str, home: Path, *handles: str) -> list[dict[str, str]]:
    """`presets.resolve` of each handle in a process whose kagglehub asks `url`."""
    code = (
        "import json, sys; from kagglesdk import kaggle_env as k; from s2s_ray import presets\n"
        "from s2s_ray.errors import S2SRayError\n"
        "k._env_to_endpoint[k.KaggleEnv.TEST] = sys.argv[1]\n"
        "for handle in sys.argv[2:]:\n"
        "    try:\n        answer = {'digest': presets.resolve(handle).digest}\n"
        "    except S2SRayError as e:\n        answer = {'error': type(e).__name__, 'message': str(e)}\n"
        "    print('ANSWER', json.dumps(answer), flush=True)\n"
    )
    settings = {"KAGGLE_API_ENVIRONMENT": "TEST", "KAGGLEHUB_CACHE": str(home), "KAGGLE_CONFIG_DIR": str(home)}
    process = subprocess.run(
        [sys.executable, "-c", code, url, *handles], env=os.environ | settings, capture_output=True, text=True
    )
    answers = [line.removeprefix("ANSWER ") for line in process.stdout.splitlines() if line.startswith("ANSWER ")]
    assert len(answers) == len(handles), process.stderr
    return [json.loads(answer) for answer in answers]


def test_download_refusal_and_cache(kaggle: type[Kaggle], tmp_path: Path) -> None:
    handle, home = "kaggle://keras/bart/keras/bart_base_en", tmp_path / "home"
    newest, older, absent, version, broken = resolve_elsewhere(
        kaggle.url,  # type: ignore[attr-defined]
        home,
        handle,
        f"{handle}/2",
        "kaggle://keras/bart/keras/none",
        f"{handle}/9",
        "kaggle://down/bart/keras/bart_base_en",
    )
    digest = presets.resolve(kaggle.directory).digest
    assert newest == older == {"digest": digest}
    assert (
        absent["error"] == version["error"] == "PresetError" and "no model keras/bart/keras/none" in absent["message"]
    )
    assert broken["error"] == "InfrastructureError"
    kaggle.requested.clear()
    (again,) = resolve_elsewhere(kaggle.url, home, f"{handle}/3")  # type: ignore[attr-defined]
    assert again == newest and not kaggle.requested
    unreachable, cached = resolve_elsewhere("http://127.0.0.1:9", home, handle, f"{handle}/3")
    assert unreachable["error"] == "InfrastructureError" and cached == newest
