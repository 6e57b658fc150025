"""The files for `ray up` and the container file: Ray's own schema, authentication, one image, no secrets."""

import re
from typing import Any

import pytest
import yaml
from job_helpers import ROOT

PROVIDERS = ("aws", "gcp")


def read(provider: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / f"{provider}.yaml").read_text())
    return config


@pytest.mark.parametrize("provider", PROVIDERS)
def test_ray_up_accepts_the_file(provider: str) -> None:
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(read(provider))
    validate_config(prepared)
    workers = prepared["available_node_types"]["gpu"]
    assert (workers["min_workers"], workers["max_workers"]) == (0, prepared["max_workers"])
    assert prepared["available_node_types"][prepared["head_node_type"]]["resources"] == {"CPU": 0}
    with pytest.raises(ValidationError):  # the schema is one that refuses
        validate_config(prepared | {"worker_types": {}})


@pytest.mark.parametrize("provider", PROVIDERS)
def test_authentication_is_on_and_no_secret_is_in_it(provider: str) -> None:
    config, text = read(provider), (ROOT / "cluster" / f"{provider}.yaml").read_text()
    starts = [c for side in ("head", "worker") for c in config[f"{side}_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2 and all(command.startswith("RAY_AUTH_MODE=token ") for command in starts)
    assert list(config["file_mounts"].values()) == ["~/.ray/auth_token"]
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert not re.search(r"(?i)secret_access|api_key|password|AKIA|private_key", text)


def test_ray_start_knows_the_flags() -> None:
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    text = "\n".join((ROOT / "cluster" / name).read_text() for name in ("aws.yaml", "gcp.yaml", "README.md"))
    commands = re.findall(r"ray start ((?:--\S+\s*)+)", text)
    flags = {flag.partition("=")[0] for command in commands for flag in command.split()}
    assert len(commands) >= 6 and {"--head", "--address", "--dashboard-host"} <= flags <= known
    for job in ("summarize", "finetune"):
        manifest = next(yaml.safe_load_all((ROOT / "cluster" / f"rayjob-{job}.yaml").read_text()))
        cluster = manifest["spec"]["rayClusterSpec"]
        groups = (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
        assert {f"--{name}" for group in groups for name in group["rayStartParams"]} <= known


def test_one_image_with_the_rays_version_everywhere() -> None:
    containerfile = (ROOT / "cluster" / "Containerfile").read_text()
    (tag,) = re.findall(r"docker build .* -t (\S+) ", containerfile)
    assert {read(provider)["docker"]["image"] for provider in PROVIDERS} == {tag}
    manifests = [(ROOT / "cluster" / f"rayjob-{job}.yaml").read_text() for job in ("summarize", "finetune")]
    assert all(set(re.findall(r"image: (\S+)", manifest)) == {tag} for manifest in manifests)
    (version,) = re.findall(r"^ARG BASE=rayproject/ray:([\d.]+)-", containerfile, re.MULTILINE)
    assert all(f'rayVersion: "{version}"' in manifest for manifest in manifests)
    extras = set(re.findall(r"\[([a-z0-9,]+)\]'", containerfile)[0].split(","))
    assert {"s3", "gcs", "eval"} == extras
