"""What the driver makes of a cluster that fails: a typed error, never a hang."""

import errno
import time
from typing import Any

import pytest

from s2s_ray.errors import InfrastructureError, InputError
from s2s_ray.pipelines.cluster import execute


def stuck(row: dict[str, Any]) -> dict[str, Any]:
    time.sleep(60)
    return row


def refuses(row: dict[str, Any]) -> dict[str, Any]:
    raise InputError("a stage's own error")


def full_disk(row: dict[str, Any]) -> dict[str, Any]:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_no_progress_ends_the_job(local_ray: None) -> None:
    """I4"""
    import ray

    started = time.monotonic()
    with pytest.raises(InfrastructureError, match="nothing moved for 3 s"):
        list(execute(ray.data.from_items([{"unit": 1}]).map(stuck), 3.0))
    assert time.monotonic() - started < 50


def test_errors_of_stages_keep_their_type(local_ray: None) -> None:
    import ray

    with pytest.raises(InputError, match="a stage's own error"):
        list(execute(ray.data.from_items([{"unit": 1}]).map(refuses)))
    with pytest.raises(InfrastructureError, match=r"the cluster failed: .*No space left"):
        list(execute(ray.data.from_items([{"unit": 1}]).map(full_disk)))
