"""Flags, TOML and ranges of a generate job's settings."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from s2s_ray.errors import SettingsError
from s2s_ray.generation.settings import GenerationSettings
from s2s_ray.pipelines.command import parse_summarize
from s2s_ray.pipelines.settings import FIELDS, GenerateSettings, parse
from s2s_ray.presets import DEFAULT_SUMMARIZER

NEEDED = ["--input", "in", "--output", "out", "--preset", "p"]


def settings(**changes: Any) -> GenerateSettings:
    return GenerateSettings(**{"input": ("in",), "output": "out", "preset": "p", **changes})


def test_flags_make_fields() -> None:
    flags = ["--input", "a", "b", "--input", "c", "--output", "o", "--preset", "p", "--columns", "id", "title"]
    flags += ["--num-beams", "4", "--length-penalty", "2", "--max-target-length", "60", "--dry-run", "--score"]
    parsed = parse(flags, "", {})
    assert parsed.input == ("a", "b", "c") and parsed.columns == ("id", "title")
    assert (parsed.num_beams, parsed.length_penalty, parsed.dry_run, parsed.score) == (4, 2.0, True, True)
    assert parse([*NEEDED, "--columns"], "", {}).columns == ()
    assert parse(NEEDED, "", {}) == settings()


def test_every_field_has_a_flag_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"], "", {})
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for name, field in FIELDS.items():
        assert f"--{name.replace('_', '-')}" in shown and field.metadata["help"]


def test_toml_under_flags(tmp_path: Path) -> None:
    config = tmp_path / "job.toml"
    config.write_text('input = ["a", "b"]\noutput = "o"\npreset = "p"\nnum-beams = 2\nnum_replicas = 3\ntop_p = 1\n')
    with pytest.raises(SettingsError, match="--top-p needs --sampler"):
        parse(["--config", str(config)], "", {})
    parsed = parse(["--config", str(config), "--sampler", "top_p", "--num-beams", "1"], "", {})
    assert (parsed.input, parsed.num_replicas, parsed.top_p, parsed.num_beams) == (("a", "b"), "3", 1.0, 1)


@pytest.mark.parametrize(
    "content,message",
    [
        ("num_beems = 2", "unknown setting 'num_beems' .* did you mean num_beams"),
        ('num_beams = "2"', "num_beams must be a whole number"),
        ("num_beams = true", "num_beams must be a whole number"),
        ("top_p = nan", "--top-p must be a finite number"),
        ('input = "a"', "input must be a list of strings"),
        ("dry_run = 1", "dry_run must be true or false"),
        ("num_beams = ", "must be a readable TOML file"),
    ],
)
def test_toml_errors(tmp_path: Path, content: str, message: str) -> None:
    config = tmp_path / "job.toml"
    config.write_text(content)
    with pytest.raises(SettingsError, match=message):
        parse(["--config", str(config), *NEEDED[2:]], "", {"input": ("in",)})


@pytest.mark.parametrize(
    "changes",
    [
        {"num_beams": 0},
        {"max_error_rate": 1.5},
        {"num_replicas": "0"},
        {"num_replicas": "4:2"},
        {"num_replicas": "many"},
        {"rows_per_unit": 0},
        {"sampler": "topk"},
        {"on_long": "split"},
        {"publish": "move"},
        {"gpus_per_replica": -1.0},
        {"input": ()},
        {"temperature": 0.5},
        {"sampler": "random", "num_beams": 4},
        {"sampler": "greedy", "num_beams": 4},
        {"text_column": ""},
        {"dtype": "int8"},
    ],
)
def test_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        settings(**changes)


def test_missing_flags() -> None:
    with pytest.raises(SettingsError, match="--input, --output, --preset must be given"):
        parse([], "", {})
    with pytest.raises(SystemExit) as caught:
        parse([*NEEDED, "--no-such-flag"], "", {})
    assert caught.value.code == 2


def test_generation_changes() -> None:
    base = GenerationSettings(num_beams=4, length_penalty=2.0, max_length=60)
    assert base.replace(**settings().generation_changes()) == base
    greedy = base.replace(**settings(sampler="greedy", max_target_length=9).generation_changes())
    assert (greedy.num_beams, greedy.do_sample, greedy.max_new_tokens) == (1, False, 9)
    assert base.replace(**settings(sampler="beam").generation_changes()).num_beams == 5
    top_k = base.replace(**settings(sampler="top_k", seed=3, temperature=0.5).generation_changes())
    assert (top_k.do_sample, top_k.num_beams, top_k.top_k, top_k.top_p) == (True, 1, 5, 1.0)
    assert (top_k.seed, top_k.temperature) == (3, 0.5)
    top_p = base.replace(**settings(sampler="top_p").generation_changes())
    assert (top_p.top_k, top_p.top_p) == (0, 0.1)
    contrastive = base.replace(**settings(sampler="contrastive", top_k=4).generation_changes())
    assert (contrastive.top_k, contrastive.penalty_alpha, contrastive.num_beams) == (4, 0.6, 1)
    speculative = contrastive.replace(**settings(sampler="speculative").generation_changes())
    assert (speculative.penalty_alpha, speculative.do_sample) == (0.0, False)
    with pytest.raises(SettingsError, match="--draft-preset needs --sampler speculative"):
        settings(draft_preset="small")


def test_replica_range() -> None:
    assert settings().replica_range() is None
    assert settings(num_replicas="3").replica_range() == (3, 3)
    assert settings(num_replicas="1:8").replica_range() == (1, 8)


def test_identity_holds_what_changes_rows_and_nothing_else() -> None:
    changed_rows = settings(num_beams=2).identity() != settings().identity()
    same_rows = settings(num_replicas="2", max_error_rate=0.5, publish="none", max_batch_tokens=9, device="cpu")
    assert changed_rows and same_rows.identity() == settings().identity()
    outside = {f.name for f in dataclasses.fields(GenerateSettings)} - set(settings().identity())
    assert outside == {
        *("input", "preset", "output", "max_error_rate", "max_batch_tokens", "device"),
        *("num_replicas", "gpus_per_replica", "publish", "dry_run", "address", "stall_timeout"),
        *("draft_preset", "draft_tokens"),  # guesses: no token depends on them
    }


def test_summarize_defaults() -> None:
    parsed = parse_summarize([])
    assert parsed.preset == DEFAULT_SUMMARIZER and parsed.text_column == "description"
    assert Path(parsed.input[0]).is_dir() and parsed.output == "out/summaries"
    given = parse_summarize(["--input=x", "--output", "o"])
    assert (given.input, given.text_column, given.preset) == (("x",), "text", DEFAULT_SUMMARIZER)
