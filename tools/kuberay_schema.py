"""Make the schema that tests/jobs/test_cluster_manifests.py holds the manifests to, from KubeRay's own CRD.

    git clone --depth 1 --branch v1.7.0 https://github.com/ray-project/kuberay .data/kuberay
    python tools/kuberay_schema.py .data/kuberay/helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml \\
        tests/jobs/kuberay/rayjob-v1.7.0.json.gz

Of the CRD (Apache-2.0, copyright the KubeRay authors) it keeps version v1 of RayJob without the descriptions.
"""

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import yaml


def without_descriptions(schema: Any, *, names: bool = False) -> Any:
    """`names`: the keys are the names of properties, among which there may be one called description."""
    if isinstance(schema, list):
        return [without_descriptions(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = schema if names else {key: value for key, value in schema.items() if key != "description"}
    return {key: without_descriptions(value, names=key == "properties" and not names) for key, value in kept.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crd", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    definition = yaml.safe_load(args.crd.read_text("utf-8"))
    (version,) = (version for version in definition["spec"]["versions"] if version["name"] == "v1")
    schema = without_descriptions(version["schema"]["openAPIV3Schema"])
    content = json.dumps(schema, sort_keys=True, separators=(",", ":")).encode()
    args.target.write_bytes(gzip.compress(content, 9, mtime=0))


if __name__ == "__main__":
    main()
