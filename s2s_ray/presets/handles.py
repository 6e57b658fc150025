"""What a preset string may be, by full-match grammars; nothing is opened here.

debian_summarizer_en            a built-in name
./my_preset  /data/my_preset    a directory (also any os.PathLike)
hf://facebook/bart-base@main    a Hugging Face repository, optionally at a branch, tag or commit
s3://bucket/presets/my_preset   a directory on any fsspec filesystem (gs://, memory://, file:// ...)
summarizer@3                    version 3 of a preset in the store that S2S_RAY_STORE names
s3://bucket/store/summarizer@3  the same with the store spelled out; instead of 3 also a 64-digit digest
kaggle://keras/bart/keras/bart_base_en/3   a Kaggle model: org, model, framework, variation, optionally a version
"""

import os
import re
from dataclasses import dataclass
from enum import StrEnum

from s2s_ray.errors import InputError, PresetError
from s2s_ray.storage import Location

STORE_VARIABLE = "S2S_RAY_STORE"
MAX_HANDLE = 4096
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_VERSION = r"[1-9][0-9]{0,7}|[0-9a-f]{64}"
PRESET_NAME = re.compile(_NAME)
_STORED = re.compile(rf"(?P<name>{_NAME})@(?P<version>{_VERSION})")
_HUB = re.compile(
    r"hf://(?P<repository>[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95})"
    r"(@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{0,127}))?"
)
_KAGGLE = re.compile(r"kaggle://(?P<model>[A-Za-z0-9_-]+(/[A-Za-z0-9][A-Za-z0-9._-]{0,95}){3}(/[1-9][0-9]{0,7})?)")


class HandleKind(StrEnum):
    NAME = "name"
    DIRECTORY = "directory"
    HUGGINGFACE = "huggingface"
    KAGGLE = "kaggle"
    STORE = "store"


@dataclass(frozen=True, slots=True)
class Handle:
    """A parsed handle. `target` is the name, the path or URL, the repository, or for STORE the preset's name."""

    kind: HandleKind
    target: str
    version: str | None = None  # STORE: a number or a digest, None for the newest; HUGGINGFACE: the revision
    store: str | None = None  # STORE: the store's path or URL

    def __str__(self) -> str:
        version = f"@{self.version}" if self.version else ""
        scheme = {HandleKind.HUGGINGFACE: "hf://", HandleKind.KAGGLE: "kaggle://"}.get(self.kind, "")
        store = f"{self.store.rstrip('/')}/" if self.store else ""
        return f"{scheme}{store}{self.target}{version}"


def parse(handle: str | os.PathLike[str]) -> Handle:
    """Raises PresetError for a handle of no known form; a plain name is not looked up here."""
    if isinstance(handle, os.PathLike):
        return Handle(HandleKind.DIRECTORY, Location.parse(handle).path)
    if not isinstance(handle, str) or not 0 < len(handle) <= MAX_HANDLE or not handle.isprintable():
        raise PresetError(f"a preset must be a name, path or URL. Received: {str(handle)[:200]!r}")
    if handle.startswith("hf://"):
        match = _HUB.fullmatch(handle)
        if match is None or ".." in handle:
            raise PresetError(f"a Hugging Face preset must be hf://org/name[@revision]. Received: {handle!r}")
        return Handle(HandleKind.HUGGINGFACE, match["repository"], match["revision"])
    if handle.startswith("kaggle://"):
        match = _KAGGLE.fullmatch(handle)
        if match is None:
            raise PresetError(
                f"a Kaggle preset must be kaggle://org/model/framework/variation[/version]. Received: {handle!r}"
            )
        return Handle(HandleKind.KAGGLE, match["model"])
    parent, _, last = handle.rpartition("/")
    if stored := _STORED.fullmatch(last):
        return Handle(HandleKind.STORE, stored["name"], stored["version"], _store(parent, handle))
    if PRESET_NAME.fullmatch(handle):
        return Handle(HandleKind.NAME, handle)
    return Handle(HandleKind.DIRECTORY, _location(handle))


def _store(parent: str, handle: str) -> str:
    store = (parent or "/") if "/" in handle else os.environ.get(STORE_VARIABLE, "")
    if not store or store.endswith(":/"):
        raise PresetError(
            f"{handle!r} names a version in a preset store: set {STORE_VARIABLE} to the store's path or URL, "
            "or write it before the name (s3://bucket/store/name@1)"
        )
    return _location(store)


def _location(text: str) -> str:
    try:
        return Location.parse(text).url
    except (InputError, RuntimeError) as error:  # RuntimeError: pathlib knows no home directory of ~name
        raise PresetError(f"not a preset: {error}") from error
