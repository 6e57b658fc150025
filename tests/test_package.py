"""What is installed: the wheel holds everything that the package reads at run time, and nothing else."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import s2s_ray

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this checkout, built in a copy because a build leaves files in its source."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "s2s_ray", source / "s2s_ray", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(target), str(source)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr + done.stdout
    (built,) = target.glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_holds_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = (path for path in (ROOT / "s2s_ray").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert held == {path.relative_to(ROOT).as_posix() for path in files}
    assert "s2s_ray/py.typed" in held


def test_the_wheel_holds_the_samples_and_the_built_in_presets(wheel: zipfile.ZipFile) -> None:
    from s2s_ray import presets

    names = wheel.namelist()
    for sample in ("package_descriptions", "package_translations"):
        folder = f"s2s_ray/samples/{sample}/"
        assert len([name for name in names if name.startswith(folder) and name.endswith(".parquet")]) >= 2
    for name in (presets.DEFAULT_SUMMARIZER, presets.DEFAULT_TRANSLATOR):
        preset = f"s2s_ray/presets/builtin/{name}"
        for file in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors", "manifest.json"):
            assert f"{preset}/{file}" in names
        assert wheel.getinfo(f"{preset}/model.safetensors").file_size <= 16 * 2**20


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    (info,) = (name.split("/")[0] for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = message_from_bytes(wheel.read(f"{info}/METADATA"))
    assert metadata["Version"] == s2s_ray.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert b"Apache License" in wheel.read(f"{info}/licenses/LICENSE")


def test_the_lower_bounds_are_the_ones_that_are_tested() -> None:
    """tests/lower-bounds.txt makes the environment of the lowest versions; a bound changed here alone is untested."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    extras = (requirement for extra in project["optional-dependencies"].values() for requirement in extra)
    requirements = {canonicalize_name(r.name): r for r in map(Requirement, (*project["dependencies"], *extras))}
    requirements.pop("s2s-ray")
    lines = (ROOT / "tests" / "lower-bounds.txt").read_text("utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pins.keys() == requirements.keys()
    for name, requirement in requirements.items():
        (bound,) = (s.version for s in requirement.specifier if s.operator in (">=", "=="))
        assert Version(bound.replace(".*", ".0")) == Version(pins[name]), name
        assert pins[name] in requirement.specifier


def test_the_version_is_one() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    assert project["version"] == s2s_ray.__version__
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
