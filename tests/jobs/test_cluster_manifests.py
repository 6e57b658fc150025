"""The shipped manifests: KubeRay's own schema, flags the job accepts, authentication on, no secrets."""

import copy
import gzip
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from job_helpers import ROOT
from jsonschema import Draft202012Validator, ValidationError

from s2s_ray.pipelines import finetune_settings
from s2s_ray.pipelines.command import parse_summarize
from s2s_ray.presets import handles

MANIFESTS = [ROOT / "cluster" / f"rayjob-{job}.yaml" for job in ("summarize", "finetune")]
SCHEMA = Path(__file__).parent / "kuberay" / "rayjob-v1.7.0.json.gz"
all_manifests = pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)


def documents(manifest: Path) -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all(manifest.read_text())}


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """KubeRay's, closed: Kubernetes drops fields that it does not name without a word, and here they are errors."""
    schema: dict[str, Any] = json.loads(gzip.decompress(SCHEMA.read_bytes()))
    close(schema)
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return schema


def close(schema: Any) -> None:
    if isinstance(schema, dict) and isinstance(schema.get("properties"), dict):
        schema.setdefault("additionalProperties", False)
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        close(part)


def validate(instance: Any, schema: dict[str, Any]) -> None:
    Draft202012Validator(schema).validate(instance)


def at(node: Any, path: str) -> Any:
    for key in path.split("/"):
        node = node[int(key) if key.isdecimal() else key]
    return node


@all_manifests
def test_kuberay_knows_every_field(manifest: Path, schema: dict[str, Any]) -> None:
    validate(documents(manifest)["RayJob"], schema)
    pod = "spec/rayClusterSpec/headGroupSpec/template/spec"
    volume = at(schema, f"properties/{pod.replace('/', '/properties/')}/properties/volumes/items")
    claim = at(volume, "properties/ephemeral/properties/volumeClaimTemplate/properties/spec")
    validate(documents(manifest)["PersistentVolumeClaim"]["spec"], claim)


@pytest.mark.parametrize(
    ("place", "key", "value", "message"),
    [
        ("spec", "shutdownAfterFinish", True, r"'shutdownAfterFinish' was unexpected"),
        ("spec", "ttlSecondsAfterFinished", "600", "'600' is not of type 'integer'"),
        ("spec/rayClusterSpec", "enableAutoscaling", True, "'enableAutoscaling' was unexpected"),
        ("spec/rayClusterSpec/authOptions", "mode", "tokens", "'tokens' is not one of"),
        ("spec/rayClusterSpec/workerGroupSpecs/0", "maxReplica", 8, "'maxReplica' was unexpected"),
        ("spec/rayClusterSpec/workerGroupSpecs/0/template/spec/containers/0", "volumeMount", [], "was unexpected"),
    ],
)
def test_a_field_that_kuberay_does_not_know_is_found(
    schema: dict[str, Any], place: str, key: str, value: object, message: str
) -> None:
    job = copy.deepcopy(documents(MANIFESTS[0])["RayJob"])
    at(job, place)[key] = value
    with pytest.raises(ValidationError, match=message):
        validate(job, schema)


@all_manifests
def test_the_job_accepts_the_flags(manifest: Path) -> None:
    job = documents(manifest)["RayJob"]["spec"]
    command = shlex.split(job["entrypoint"])
    assert command[0] == "python" and (ROOT / command[1]).is_file()
    settings: Any
    if "finetune" in command[1]:
        settings = finetune_settings.parse(command[2:], "", {})
        workers = settings.worker_range()
    else:
        settings = parse_summarize(command[2:])
        workers = settings.replica_range()
    handles.parse(settings.preset)
    group = job["rayClusterSpec"]["workerGroupSpecs"][0]
    assert workers == (group["minReplicas"], group["maxReplicas"])
    assert settings.output.startswith("s3://") and settings.input[0].startswith("s3://")


@all_manifests
def test_authentication_and_exposure(manifest: Path) -> None:
    cluster = documents(manifest)["RayJob"]["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    name = documents(manifest)["RayJob"]["metadata"]["name"]
    policy = documents(manifest)["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == {"ray.io/originated-from-cr-name": name}
    assert documents(manifest)["NetworkPolicy"]["spec"]["policyTypes"] == ["Ingress"]
    assert not re.search(r"(?i)secret_access|api_key|password|AKIA", manifest.read_text())


@all_manifests
def test_one_preset_cache_for_all_nodes(manifest: Path) -> None:
    cluster = documents(manifest)["RayJob"]["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        container = pod["containers"][0]
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        claims = {v["name"]: v.get("persistentVolumeClaim", {}).get("claimName") for v in pod["volumes"]}
        assert (
            claims[mounts[environment["S2S_RAY_CACHE"]]]
            == documents(manifest)["PersistentVolumeClaim"]["metadata"]["name"]
        )


def test_commands_of_the_readme_parse() -> None:
    text = (Path(ROOT) / "cluster" / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"python jobs/summarize\.py (--input .*)", text)
    assert commands
    for command in commands:
        parse_summarize(shlex.split(command))
