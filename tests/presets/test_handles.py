"""The grammar of preset handles: what is accepted names one thing, and nothing else is accepted."""

import random
from pathlib import Path

import pytest

from s2s_ray.errors import PresetError
from s2s_ray.presets.handles import Handle, HandleKind, parse

DIGEST = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bart_base_en", Handle(HandleKind.NAME, "bart_base_en")),
        ("/data/my preset", Handle(HandleKind.DIRECTORY, "/data/my preset")),
        ("/data/Übersetzer", Handle(HandleKind.DIRECTORY, "/data/Übersetzer")),
        ("file:///data/p", Handle(HandleKind.DIRECTORY, "/data/p")),
        ("memory://a/b", Handle(HandleKind.DIRECTORY, "memory://a/b")),
        ("s3://bucket/a/b/", Handle(HandleKind.DIRECTORY, "s3://bucket/a/b")),
        ("hf://org/name", Handle(HandleKind.HUGGINGFACE, "org/name")),
        ("hf://org/na.me@refs/pr-1", Handle(HandleKind.HUGGINGFACE, "org/na.me", "refs/pr-1")),
        (
            "kaggle://keras/bart/keras/bart_base_en/3",
            Handle(HandleKind.KAGGLE, "keras/bart/keras/bart_base_en/3"),
        ),
        ("/store/p@3", Handle(HandleKind.STORE, "p", "3", "/store")),
        ("/p@3", Handle(HandleKind.STORE, "p", "3", "/")),
        ("memory://store/p@12", Handle(HandleKind.STORE, "p", "12", "memory://store")),
        (f"s3://bucket/store/p@{DIGEST}", Handle(HandleKind.STORE, "p", DIGEST, "s3://bucket/store")),
    ],
)
def test_forms(text: str, expected: Handle) -> None:
    assert parse(text) == expected
    assert parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a\0b",
        "a\nb",
        "x" * 5000,
        "hf://",
        "hf://name",
        "hf://org/name/more",
        "hf://org/name@",
        "hf://org/name@../x",
        "hf://../name",
        "hf://user:pw@org/name",
        "hf://org/name?x=1",
        "kaggle://",
        "kaggle://a",
        "kaggle://a/b/keras",
        "kaggle://a/b/keras/c/d",
        "kaggle://a/b/keras/c/1/d",
        "kaggle://a/../b",
        "kaggle://a/b?x",
        "s3://",
        "s3://p@3",
        "s3://user:pw@bucket/p",
        "s3://user@bucket/store/p@1",
        "s3://bucket/p?versionId=1",
        "s3://bucket/../other/p",
        "filecache::s3://bucket/p",
        "zip://a.zip::s3://bucket/p",
        "ftp://host/p",
        "nope://x/y",
        "file://relative/p",
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(PresetError):
        parse(text)


def test_a_path_object_is_a_directory_whatever_its_name(tmp_path: Path) -> None:
    for name in ("bart_base_en", "p@3", "hf:"):
        assert parse(tmp_path / name) == Handle(HandleKind.DIRECTORY, str(tmp_path / name))


def test_a_bare_version_needs_the_store_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("S2S_RAY_STORE", raising=False)
    with pytest.raises(PresetError, match="S2S_RAY_STORE"):
        parse("p@3")
    monkeypatch.setenv("S2S_RAY_STORE", "memory://store")
    assert parse("p@3") == Handle(HandleKind.STORE, "p", "3", "memory://store")


def test_credentials_are_not_repeated_in_the_error() -> None:
    with pytest.raises(PresetError) as raised:
        parse("s3://AKIACANARY:SECRETCANARY@bucket/p")
    assert "CANARY" not in str(raised.value)


def test_any_string_is_parsed_or_refused() -> None:
    seed = 7
    rng = random.Random(seed)
    pieces = ["hf", "s3", "kaggle", "file", "memory", "://", "::", ":", "/", "//", "@", "..", ".", "?", "#", "~", "%2e"]
    pieces += ["a", "b1", "c_d", "1", DIGEST, "é", " ", "\\", "\x7f", "-", "\ud800"]
    for _ in range(5000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 9)))
        try:
            handle = parse(text)
        except PresetError:
            continue
        assert "::" not in text or "://" not in text, (text, seed)
        if handle.kind in (HandleKind.HUGGINGFACE, HandleKind.KAGGLE):
            assert "?" not in text and ".." not in text, (text, seed)
        elif handle.kind is HandleKind.DIRECTORY and "://" not in handle.target:
            assert Path(handle.target).is_absolute(), (text, seed)
        elif handle.kind is HandleKind.STORE:
            assert handle.version and handle.store, (text, seed)
        elif handle.kind is HandleKind.NAME:
            assert "/" not in text and not text.startswith("."), (text, seed)
