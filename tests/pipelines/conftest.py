"""One Ray for all tests that run the pipeline in this process; starting one costs more than most runs."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "chaos"))  # for checker.py


@pytest.fixture(scope="session")
def local_ray(s3_server: str) -> Iterator[None]:
    """A local Ray with more logical CPUs than cores; it starts after `s3_server`, so workers find S3 too."""
    import ray

    ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
