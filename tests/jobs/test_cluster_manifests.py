"""The shipped manifests: flags the job accepts, authentication on, no secrets."""

import re
import shlex
from pathlib import Path
from typing import Any

import yaml
from job_helpers import ROOT

from s2s_ray.pipelines.command import parse_summarize
from s2s_ray.presets import handles

MANIFEST = ROOT / "cluster" / "rayjob-summarize.yaml"


def documents() -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all(MANIFEST.read_text())}


def test_the_job_accepts_the_flags() -> None:
    command = shlex.split(documents()["RayJob"]["spec"]["entrypoint"])
    assert command[0] == "python" and (ROOT / command[1]).is_file()
    settings = parse_summarize(command[2:])
    handles.parse(settings.preset)
    group = documents()["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert settings.replica_range() == (group["minReplicas"], group["maxReplicas"])
    assert settings.output.startswith("s3://") and settings.input[0].startswith("s3://")


def test_authentication_and_exposure() -> None:
    cluster = documents()["RayJob"]["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert documents()["NetworkPolicy"]["spec"]["policyTypes"] == ["Ingress"]
    assert not re.search(r"(?i)secret_access|api_key|password|AKIA", MANIFEST.read_text())


def test_one_preset_cache_for_all_nodes() -> None:
    cluster = documents()["RayJob"]["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        container = pod["containers"][0]
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        claims = {v["name"]: v.get("persistentVolumeClaim", {}).get("claimName") for v in pod["volumes"]}
        assert claims[mounts[environment["S2S_RAY_CACHE"]]] == documents()["PersistentVolumeClaim"]["metadata"]["name"]


def test_commands_of_the_readme_parse() -> None:
    text = (Path(ROOT) / "cluster" / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"python jobs/summarize\.py (--input .*)", text)
    assert commands
    for command in commands:
        parse_summarize(shlex.split(command))
