"""Small sealed presets, and a node cache of their own for every test."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file


@pytest.fixture(autouse=True)
def node_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "node_cache"
    monkeypatch.setenv("S2S_RAY_CACHE", str(path))
    monkeypatch.delenv("S2S_RAY_STORE", raising=False)
    return path


def write_preset(directory: Path, seed: int, size: int = 2000) -> Path:
    """A directory that is a preset to the store: config, weights and three small files; content decided by `seed`."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    save_file({"w": rng.standard_normal(size, dtype=np.float32)}, directory / "model.safetensors")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "README.md"):
        (directory / name).write_text(f'{{"seed": {seed}}}')
    return directory


@pytest.fixture
def make_preset(tmp_path: Path) -> Callable[[int], Path]:
    return lambda seed: write_preset(tmp_path / "sources" / str(seed), seed)
