"""A job's settings as one frozen dataclass; from it come the flags, the TOML file's keys, and the checks of types."""

import argparse
import dataclasses
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TypeVar

from s2s_ray.errors import SettingsError

S = TypeVar("S")
_RANGES = ("num_replicas", "num_workers")  # strings such as 2:8, for which a file may also give a whole number


def setting(
    default: Any, help: str, kind: type = str, *, unit: str = "", choices: Sequence[str] = (), identity: bool = True
) -> Any:
    """A field. `identity`: part of the fingerprint, because what comes out may differ when it changes."""
    metadata = {"help": help, "kind": kind, "unit": unit, "choices": tuple(choices), "identity": identity}
    return dataclasses.field(default=default, metadata=metadata)


def fields_of(settings: Any) -> dict[str, "dataclasses.Field[Any]"]:
    """The fields of a settings class, or of settings, by name."""
    return {field.name: field for field in dataclasses.fields(settings)}


def add_flags(parser: argparse.ArgumentParser, cls: type, defaults: Mapping[str, Any]) -> None:
    """One flag per field of `cls`, and --config. `defaults` only changes what the help says."""
    parser.add_argument("--config", metavar="FILE.toml", help="settings from a file; flags win over it")
    for name, field in fields_of(cls).items():
        metadata = field.metadata
        default = defaults.get(name, field.default)
        notes = [f"in {metadata['unit']}"] if metadata["unit"] else []
        if default not in (None, MISSING, False):
            notes.append(f"default {' '.join(default) if isinstance(default, tuple) else default}")
        text = metadata["help"].replace("%", "%%") + (f" ({'; '.join(notes)})" if notes else "")
        options: dict[str, Any] = {"help": text, "dest": name, "default": None}
        if metadata["kind"] is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif metadata["kind"] is tuple:
            options |= {"nargs": "*" if default is None else "+", "action": "extend", "metavar": name.upper()}
        else:
            options |= {"type": metadata["kind"], "choices": metadata["choices"] or None}
        parser.add_argument(flag(name), **options)


def parse(cls: type[S], argv: Sequence[str], description: str, defaults: Mapping[str, Any]) -> S:
    """Settings from flags, over those of --config, over `defaults`. Raises SettingsError; argparse SystemExit(2)."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_flags(parser, cls, defaults)
    flags = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    config = flags.pop("config", None)
    values = {**defaults, **(read_config(Path(config), cls) if config else {}), **flags}
    missing = [name for name, field in fields_of(cls).items() if field.default is MISSING and name not in values]
    if missing:
        raise SettingsError(f"{', '.join(map(flag, missing))} must be given")
    return cls(**values)


def read_config(path: Path, cls: type) -> dict[str, Any]:
    """The settings of a TOML file; keys are field names, with - or _. Raises SettingsError that names close matches."""
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"--config must be a readable TOML file. Received: {path} ({error})") from error
    known = fields_of(cls)
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3) or sorted(known)
            raise SettingsError(f"unknown setting {key!r} in {path}; did you mean {' or '.join(close)}?")
        values[name] = value
    return values


def check_types(settings: Any) -> None:
    """Bring every field of a frozen dataclass to its declared type, or raise SettingsError."""
    for field in dataclasses.fields(settings):
        object.__setattr__(settings, field.name, _checked(field, getattr(settings, field.name)))


def identity(settings: Any, left_out: Sequence[str] = ()) -> dict[str, Any]:
    """The settings that decide what comes out, by name, for the fingerprint."""
    fields = (f for f in dataclasses.fields(settings) if f.metadata["identity"] and f.name not in left_out)
    return {field.name: getattr(settings, field.name) for field in fields}


def _checked(field: "dataclasses.Field[Any]", value: Any) -> Any:
    """The value in its declared type (a TOML file gives lists and whole numbers), or SettingsError."""
    kind, name = field.metadata["kind"], field.name
    if value is None and field.default is None:
        return None
    if kind is tuple and not isinstance(value, str) and isinstance(value, Sequence):
        if all(isinstance(item, str) for item in value):
            return tuple(value)
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        require(value == value and abs(value) != float("inf"), name, "a finite number", value)
        return float(value)
    elif kind is str and name in _RANGES and isinstance(value, int):
        return str(value)
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        choices = field.metadata["choices"]
        require(not choices or value in choices, name, f"one of {', '.join(choices)}", value)
        return value
    wanted = {
        tuple: "a list of strings",
        str: "a string",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
    }
    raise SettingsError(f"{name} must be {wanted[kind]}. Received: {value!r}")


def require(holds: bool, name: str, what: str, value: object) -> None:
    """Raise SettingsError unless `holds`, naming the flag, what must hold, and what was received."""
    if not holds:
        raise SettingsError(f"{flag(name)} must be {what}. Received: {value!r}")


def flag(name: str) -> str:
    """A field's name as a flag."""
    return f"--{name.replace('_', '-')}"
