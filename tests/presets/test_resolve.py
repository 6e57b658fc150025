"""`presets.resolve` over the kinds of handles, and writing presets."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from s2s_ray import presets
from s2s_ray.errors import PresetError, PresetIntegrityError
from s2s_ray.presets.manifest import Manifest, seal
from s2s_ray.presets.saving import new_preset

MakePreset = Callable[[int], Path]


def test_a_directory_with_and_without_manifest(make_preset: MakePreset, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_preset(1)
    plain = presets.resolve(source)
    seal(source)
    sealed = presets.resolve(str(source), expected_digest=plain.digest)
    assert (sealed.directory, sealed.digest) == (source, plain.digest)
    monkeypatch.chdir(source.parent)
    assert presets.resolve("./1").directory == presets.resolve("1").directory == source
    assert presets.resolve(f"file://{source}").digest == plain.digest
    (source / "config.json").write_text("{}")
    with pytest.raises(PresetIntegrityError):
        presets.resolve(source)
    (source / "manifest.json").unlink()
    with pytest.raises(PresetIntegrityError, match=plain.digest):
        presets.resolve(source, expected_digest=plain.digest)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(PresetError, match=r"Did you mean bart_base_en.*bart_large_en_cnn"):
        presets.resolve("bart_bse_en")
    with pytest.raises(PresetError) as raised:
        presets.resolve("zzz")
    assert "Did you mean" not in str(raised.value)


def test_what_is_no_preset(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(PresetError, match=r"config\.json"):
            presets.resolve(path)


def test_every_shipped_preset_is_whole() -> None:
    for name, metadata in presets.builtin_names().items():
        if "directory" in metadata:
            assert (Path(metadata["directory"]) / "manifest.json").exists(), name
            assert presets.resolve(name).directory == Path(metadata["directory"])
            assert metadata["description"]


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from s2s_ray.presets import weights; from s2s_ray.text import preprocessor, tokenizer\n"
        "bad = {'torch', 'ray', 'transformers', 'tokenizers', 'huggingface_hub', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def fill(directory: Path, source: Path) -> None:
    for path in source.iterdir():
        shutil.copy(path, directory)


def test_a_preset_is_written_whole_or_not_at_all(make_preset: MakePreset, tmp_path: Path) -> None:
    first, second, target = make_preset(1), make_preset(2), tmp_path / "out" / "p"
    with new_preset(target) as draft:
        fill(draft, first)
        assert not target.exists()
    assert presets.resolve(target).digest == Manifest.of_directory(first).digest
    with pytest.raises(RuntimeError, match="stop"), new_preset(target) as draft:
        fill(draft, second)
        raise RuntimeError("stop")
    assert presets.resolve(target).digest == Manifest.of_directory(first).digest
    with new_preset(target) as draft:
        fill(draft, second)
    assert presets.resolve(target).digest == Manifest.of_directory(second).digest
    assert [p.name for p in target.parent.iterdir()] == ["p"]
    (target / "notes.doc").touch()
    with pytest.raises(PresetError, match="over another preset"), new_preset(target):
        pytest.fail("not refused")


@pytest.mark.parametrize("failpoint", ["write.before:1", "write.after:1", "preset.save:1"])
def test_a_crash_while_saving_leaves_the_old_preset(make_preset: MakePreset, tmp_path: Path, failpoint: str) -> None:
    old, new, target = make_preset(1), make_preset(2), tmp_path / "p"
    shutil.copytree(old, target)
    digest = seal(target).digest
    code = (
        "import shutil, sys; from pathlib import Path; from s2s_ray.presets.saving import new_preset\n"
        "with new_preset(Path(sys.argv[2])) as draft:\n"
        "    [shutil.copy(p, draft) for p in Path(sys.argv[1]).iterdir()]\n"
    )
    environment = os.environ | {"S2S_RAY_FAILPOINT": f"{failpoint}:exit"}
    process = subprocess.run([sys.executable, "-c", code, str(new), str(target)], env=environment)
    assert process.returncode == 86
    assert presets.resolve(target).digest == digest
