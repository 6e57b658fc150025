"""Writing a preset directory so that nobody, not even after a crash, sees half of it."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from s2s_ray.errors import PresetError
from s2s_ray.failpoints import failpoint
from s2s_ray.presets.manifest import seal, strangers
from s2s_ray.storage import fsync


@contextmanager
def new_preset(target: Path) -> Iterator[Path]:
    """Yields an empty directory beside `target`; on success it is sealed, synced and renamed to `target`.

    A preset that is there is replaced (a crash between the two renames leaves it beside `target` under a hidden name).
    Raises PresetError when `target` holds files that are not a preset's. On any error `target` stays as it was.
    """
    target = target.expanduser().absolute()
    if target.exists() and not _is_replaceable(target):
        raise PresetError(f"a preset is saved to a new directory or over another preset. Received: {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.iterdir():
            fsync(path)
        seal(temporary)
        failpoint("preset.save")
        _swap(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_replaceable(target: Path) -> bool:
    is_preset = (target / "config.json").is_file() or (target.is_dir() and not any(target.iterdir()))
    return is_preset and not strangers(target)


def _swap(temporary: Path, target: Path) -> None:
    try:
        temporary.rename(target)  # also over an empty directory
    except OSError:
        old = temporary.with_suffix(".old")
        target.rename(old)
        failpoint("preset.swap")
        temporary.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    fsync(target.parent)
