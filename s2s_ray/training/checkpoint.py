"""Training checkpoints: a preset directory with the trainer's state beside the weights, under one manifest.

    <checkpoints>/step-00000500/    config.json, model.safetensors, ... (what `from_preset` loads)
                                    trainer.json, trainer.safetensors    (what training goes on from)
                                    manifest.json                        (last; without it there is no checkpoint)

A checkpoint appears locally by one rename, on an object store by its manifest. Its content does not depend on the
number of workers.
"""

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from s2s_ray.errors import PresetIntegrityError
from s2s_ray.failpoints import failpoint
from s2s_ray.presets.cache import fetch
from s2s_ray.presets.manifest import MANIFEST_FILE, MAX_MANIFEST_BYTES, Manifest, seal
from s2s_ray.presets.saving import new_preset
from s2s_ray.storage import Location, canonical_json, strict_json

STATE_FILE, TENSORS_FILE = "trainer.json", "trainer.safetensors"
_PREFIX = "step-"


class Checkpoints:
    """The checkpoints of one run, in a directory on any filesystem. One process writes; any may read."""

    def __init__(self, directory: Location) -> None:
        self.directory = directory

    def at(self, step: int) -> Location:
        """Where the checkpoint of a step is, or would be."""
        return self.directory / f"{_PREFIX}{step:08d}"

    def newest(self) -> int | None:
        """The last step whose checkpoint is complete and undamaged."""
        for step in sorted(self.steps(), reverse=True):
            with contextlib.suppress(PresetIntegrityError, FileNotFoundError):
                self.fetch(step)
                return step
        return None

    def fetch(self, step: int) -> Path:
        """A verified local directory. Raises PresetIntegrityError when the checkpoint is damaged or incomplete."""
        location = self.at(step)
        manifest = _manifest(location)
        if not location.is_local:
            return fetch(location, manifest.digest)[0]
        manifest.verify(Path(location.path))
        return Path(location.path)

    def write(self, step: int, fill: Callable[[Path], None]) -> None:
        """Write a checkpoint: `fill` gets an empty local directory."""
        write_sealed(self.at(step), fill)

    def keep_only(self, steps: set[int]) -> None:
        """Delete all other checkpoints, and whatever writers that were killed left behind."""
        kept = {self.at(step).name for step in steps}
        for name in self.directory.list_names():
            if name.lstrip(".").startswith(_PREFIX) and name not in kept:
                target = self.directory / name
                (target / MANIFEST_FILE).delete()  # first, so that no half of it counts
                target.delete(recursive=True)

    def steps(self) -> list[int]:
        """The steps for which there is anything at all."""
        names = (name.removeprefix(_PREFIX) for name in self.directory.list_names() if name.startswith(_PREFIX))
        return [int(name) for name in names if name.isdecimal()]


def write_sealed(target: Location, fill: Callable[[Path], object]) -> None:
    """Write a preset directory with its manifest, complete or not at all; `fill` gets an empty local directory."""
    if target.is_local:
        with new_preset(Path(target.path)) as directory:
            fill(directory)
        return
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        fill(directory)
        manifest = seal(directory)
        for entry in manifest.files:
            (target / entry.name).upload(directory / entry.name)
        failpoint("checkpoint.seal")
        (target / MANIFEST_FILE).write_atomic(manifest.to_bytes())


def copy_preset(checkpoint: Path, target: Location) -> None:
    """Write the preset in a checkpoint, without the trainer's state, to `target`."""

    def fill(directory: Path) -> None:
        for path in checkpoint.iterdir():
            if path.name not in (STATE_FILE, TENSORS_FILE, MANIFEST_FILE):
                shutil.copyfile(path, directory / path.name)

    write_sealed(target, fill)


def save_state(directory: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the trainer's state; tensors are on the CPU."""
    (directory / STATE_FILE).write_bytes(canonical_json(state))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / TENSORS_FILE)


def read_state(directory: Path) -> dict[str, Any]:
    """What `save_state` was given as state."""
    path = directory / STATE_FILE
    state: dict[str, Any] = strict_json(path.read_bytes(), str(path), PresetIntegrityError)
    return state


def read_tensors(directory: Path, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """(name without `prefix`, tensor) of the trainer's tensors that begin with it, read one by one."""
    with safe_open(directory / TENSORS_FILE, framework="pt") as handle:
        for name in handle.keys():  # noqa: SIM118 - no mapping
            if name.startswith(prefix):
                yield name.removeprefix(prefix), handle.get_tensor(name)


class Writer:
    """Runs one write at a time in a thread while training goes on; an error surfaces with the next call."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Start `write` once the one before is done."""
        self.wait()

        def run() -> None:
            try:
                write()
            except BaseException as error:  # handed to the caller of `wait`
                self._error = error

        self._thread = threading.Thread(target=run, name="s2s_ray checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written. Raises what the write raised."""
        if self._thread is not None:
            self._thread.join()
        error, self._error, self._thread = self._error, None, None
        if error is not None:
            raise error


def _manifest(location: Location) -> Manifest:
    path = location / MANIFEST_FILE
    try:
        return Manifest.parse(path.read_bytes(MAX_MANIFEST_BYTES + 1), path.url)
    except FileNotFoundError:
        raise PresetIntegrityError(f"{location} must hold {MANIFEST_FILE}: it was not written to its end") from None
