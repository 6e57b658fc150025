"""Checkpoints are complete or absent, locally and on S3; a damaged one is passed over; crashes leave no rubbish."""

import errno
from functools import partial
from pathlib import Path

import pytest
import torch

from s2s_ray import Seq2SeqLM
from s2s_ray.errors import PresetIntegrityError
from s2s_ray.failpoints import FAILPOINT_VARIABLE, _calls
from s2s_ray.storage import Location
from s2s_ray.training import checkpoint as files
from s2s_ray.training.checkpoint import Checkpoints, Writer

TENSORS = {"optimizer/w/exp_avg": torch.arange(6.0).reshape(2, 3), "weights/w": torch.ones(2)}


def fill(task: Seq2SeqLM, step: int, directory: Path) -> None:
    task.write_files(directory)
    files.save_state(directory, {"step": step}, TENSORS)


@pytest.fixture(params=["local", "s3"])
def checkpoints(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoints:
    monkeypatch.setenv("S2S_RAY_CACHE", str(tmp_path / "cache"))
    if request.param == "local":
        return Checkpoints(Location.parse(tmp_path / "checkpoints"))
    bucket = request.getfixturevalue("s3_server")
    return Checkpoints(Location.parse(f"{bucket}/{tmp_path.name}/checkpoints"))


def test_a_crash_or_damage_falls_back_to_the_checkpoint_before(
    checkpoints: Checkpoints, task: Seq2SeqLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert checkpoints.newest() is None
    for step in (5, 10):
        checkpoints.write(step, partial(fill, task, step))
    directory = checkpoints.fetch(checkpoints.newest())
    assert files.read_state(directory) == {"step": 10}
    read = dict(files.read_tensors(directory, "optimizer/"))
    assert set(read) == {"w/exp_avg"} and torch.equal(read["w/exp_avg"], TENSORS["optimizer/w/exp_avg"])

    failures = 0
    every = 1 if checkpoints.directory.is_local else 6
    for nth in range(1, 60, every):  # fail at every operation of storage in turn, until the write gets through
        _calls.clear()
        monkeypatch.setenv(FAILPOINT_VARIABLE, f"*:{nth}:enospc")
        try:
            checkpoints.write(15, partial(fill, task, 15))
        except OSError as error:
            assert error.errno == errno.ENOSPC
            failures += 1
        else:
            break
        finally:
            monkeypatch.delenv(FAILPOINT_VARIABLE)
        assert checkpoints.newest() in (10, 15)  # 15 if all was written and only the answer was lost
        checkpoints.keep_only({5, 10})
        assert checkpoints.newest() == 10
    assert failures > 1 and checkpoints.newest() == 15

    monkeypatch.setenv("S2S_RAY_CACHE", str(tmp_path / "another node"))  # which holds no good copy of it
    target = checkpoints.at(15) / files.TENSORS_FILE
    target.write_atomic(target.read_bytes()[:-1])
    assert checkpoints.newest() == 10
    with pytest.raises(PresetIntegrityError):
        checkpoints.fetch(15)
    checkpoints.keep_only({10})
    assert checkpoints.directory.list_names() == ["step-00000010"]

    preset = checkpoints.directory.parent / "preset"
    files.copy_preset(checkpoints.fetch(10), preset)
    loaded = Seq2SeqLM.from_preset(preset.url)
    for name, tensor in task.backbone.state_dict().items():
        assert torch.equal(loaded.backbone.state_dict()[name], tensor)
    assert not {files.STATE_FILE, files.TENSORS_FILE} & set(preset.list_names())


def test_the_writer_hands_its_error_over() -> None:
    writer, done = Writer(), []
    writer.submit(lambda: done.append(1))
    writer.wait()
    writer.submit(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer.submit(lambda: done.append(2))
    writer.wait()
    assert done == [1]
