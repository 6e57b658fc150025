"""What the README and the documentation say is so: their Python runs, their files and flags exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from s2s_ray import errors, presets
from s2s_ray.pipelines.evaluate import EvaluateSettings
from s2s_ray.pipelines.finetune_settings import FinetuneSettings
from s2s_ray.pipelines.flags import fields_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [block for named, block in fences if named == language]


def tree() -> list[Path]:
    """The paths of the README's file tree."""
    (block,) = (b for b in blocks(README, "") if "seq2seq_lm.py" in b)
    paths: list[Path] = []
    parent = Path()
    for line in block.splitlines():
        name = line.split()[0]
        inside = line.startswith(" ")
        path = parent / name if inside else Path(name)
        if not inside:
            parent = path
        paths.append(path)
    return paths


def run_python(code: str, directory: Path) -> str:
    script = directory / "snippet.py"
    script.write_text(code, "utf-8")
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(directory), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=directory, env=environment, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readmes_python_runs(tmp_path: Path) -> None:
    if not (presets.BUILTIN_DIRECTORY / presets.DEFAULT_SUMMARIZER).is_dir():
        pytest.skip("the built-in preset is not in this checkout yet")
    (code,) = blocks(README, "python")
    printed = run_python(code, tmp_path).splitlines()
    assert printed[0].strip()
    assert (tmp_path / "my_summarizer" / "model.safetensors").is_file()


def test_the_python_of_the_generation_page_runs(tmp_path: Path, tiny_bart_dir: Path) -> None:
    """With a random model in place of the built-in one: what counts is that every call is right."""
    code = "\n".join(blocks((ROOT / "docs" / "generation.md").read_text("utf-8"), "python"))
    assert presets.DEFAULT_SUMMARIZER in code
    printed = run_python(code.replace(presets.DEFAULT_SUMMARIZER, str(tiny_bart_dir)), tmp_path)
    assert len(printed.splitlines()) >= 2


def test_the_tree_names_what_exists_and_all_of_it() -> None:
    named = {path for path in tree() if path.as_posix() != "s2s_ray"}
    assert not [path for path in named if not (ROOT / path).exists()]
    package = {p.relative_to(ROOT) for p in (ROOT / "s2s_ray").iterdir() if not p.name.startswith("__")}
    package -= {Path("s2s_ray/py.typed")}
    scripts = {path.relative_to(ROOT) for path in (ROOT / "jobs").glob("*.py")}
    assert not (package | scripts) - named


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text("utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_paths_in_backquotes_exist(page: Path) -> None:
    """Of the forms s2s_ray/x.py, docs/x.md, tests/x.py, jobs/x.py, and x/y.py below s2s_ray."""
    for name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|md))`", page.read_text("utf-8")):
        assert (ROOT / name).exists() or (ROOT / "s2s_ray" / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_flags_exist(page: Path) -> None:
    known = {f"--{name.replace('_', '-')}" for name in {**fields_of(EvaluateSettings), **fields_of(FinetuneSettings)}}
    known |= {"--config", "--help"}
    known |= {"--digest", "--version", "--dtype"}  # of jobs/presets.py
    known |= {"--documents", "--limit"}  # of tools/builtin_preset/, with the next
    known |= {"--copies", "--share", "--max-tokens", "--split-by", "--target-column"}
    known |= {"--working-dir", "--index-url", "--full", "--check"}  # of ray, pip, pytest and ruff
    for line in page.read_text("utf-8").replace("\\\n", " ").splitlines():
        if "python -m " not in line:
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", line)) <= known


def test_exit_codes_are_those_of_the_errors() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", README, flags=re.MULTILINE)}
    classes = (c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.S2SRayError))
    assert listed == {c.exit_code for c in classes} | {errors.EXIT_OK, errors.EXIT_DONE_WITH_ERROR_ROWS}


def test_the_documented_settings_are_all_there_are() -> None:
    from s2s_ray.generation.settings import FIELD_NAMES

    page = (ROOT / "docs" / "generation.md").read_text("utf-8")
    table = page[page.index("## Settings") : page.index("## Samplers")]
    first_cells = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    assert {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)} == FIELD_NAMES - {"output_scores"}


def test_the_documented_samplers_are_all_there_are() -> None:
    from s2s_ray import samplers

    page = (ROOT / "docs" / "generation.md").read_text("utf-8")
    table = page[page.index("## Samplers") : page.index("A built-in sampler")]
    assert set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) == set(samplers.names())
