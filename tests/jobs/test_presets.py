"""jobs/presets.py: any source to a directory, a store and transformers, each step checked by its digest."""

import json
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from job_helpers import ROOT
from safetensors.torch import load_file

from s2s_ray.pipelines import command
from s2s_ray.presets import builtin_names

main = runpy.run_path(str(ROOT / "jobs" / "presets.py"))["main"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S2S_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("S2S_RAY_STORE", raising=False)


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as caught:
        command.main(main, [str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert caught.value.code == 0, printed.err
    return printed.out.strip()


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        command.main(main, [str(argument) for argument in arguments])
    return int(caught.value.code or 0), capsys.readouterr().err


def test_import_publish_verify_export(tiny_bart_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = shutil.copytree(tiny_bart_dir, tmp_path / "source")
    settings = json.loads((source / "tokenizer.json").read_text())["model"]
    (source / "vocab.json").write_text(json.dumps(settings["vocab"]))
    (source / "merges.txt").write_text("\n".join(m if isinstance(m, str) else " ".join(m) for m in settings["merges"]))
    (source / "tokenizer.json").unlink()
    (source / "README.md").write_text("# A card\n\nTiny.")
    digest = run(capsys, "import", source, tmp_path / "ours").splitlines()[-1]
    assert (tmp_path / "ours" / "tokenizer.json").is_file() and (tmp_path / "ours" / "manifest.json").is_file()
    weights = (tmp_path / "ours" / "model.safetensors").read_bytes()
    assert weights == (tiny_bart_dir / "model.safetensors").read_bytes()

    store = str(tmp_path / "store")
    assert run(capsys, "publish", tmp_path / "ours", store, "tiny").splitlines() == [f"{store}/tiny@1", digest]
    assert run(capsys, "list", store).endswith("tiny@1")
    assert run(capsys, "verify", f"{store}/tiny@1", "--digest", digest).endswith(digest)
    card = run(capsys, "show", f"{store}/tiny@1")
    assert digest in card and "# A card" in card and "d_model 32" in card and "bart" in card

    run(capsys, "export", f"{store}/tiny@1", tmp_path / "theirs")
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    before, after = (AutoModelForSeq2SeqLM.from_pretrained(path) for path in (tiny_bart_dir, tmp_path / "theirs"))
    assert all((value == after.state_dict()[name]).all() for name, value in before.state_dict().items())
    old, new = (AutoTokenizer.from_pretrained(path) for path in (tiny_bart_dir, tmp_path / "theirs"))
    assert old("A lazy dog.")["input_ids"] == new("A lazy dog.")["input_ids"]
    run(capsys, "export", tmp_path / "ours", tmp_path / "half", "--dtype", "bfloat16")
    assert {str(t.dtype) for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {"torch.bfloat16"}


def test_a_keras_hub_directory_is_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile(ROOT / "tests" / "presets" / "keras_hub" / "bart.zip") as archive:
        archive.extractall(tmp_path)
    digest = run(capsys, "import", tmp_path / "preset", tmp_path / "ours").splitlines()[-1]
    assert run(capsys, "verify", tmp_path / "ours").endswith(digest)


def test_what_cannot_be_verified_or_imported(
    tiny_bart_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = refused(capsys, "verify", tiny_bart_dir)
    assert code == 7 and "--digest" in message and message.count("\n") == 1
    run(capsys, "verify", tiny_bart_dir, "--digest", message.split()[-1])
    code, message = refused(capsys, "verify", tiny_bart_dir, "--digest", "0" * 64)
    assert code == 7 and "must have digest 000" in message
    assert refused(capsys, "show", "no_such_preset")[0] == 2
    assert refused(capsys, "publish", tiny_bart_dir, tmp_path / "store", "a name")[0] == 2

    wrong = shutil.copytree(tiny_bart_dir, tmp_path / "wrong")
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | {"encoder_layers": 3}))
    code, message = refused(capsys, "import", wrong, tmp_path / "ours")
    assert code == 7 and "encoder.layers.2" in message and not (tmp_path / "ours").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.doc").touch()
    assert refused(capsys, "import", tiny_bart_dir, tmp_path / "full")[0] == 2


def test_the_built_in_names_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "list")
    assert set(builtin_names()) == {line.split()[0] for line in printed.splitlines()}
    assert {"bart_large_en_cnn", "t5_small_multi", "flan_base_multi", "t5_1.1_xxl"} <= set(builtin_names())


def test_reading_commands_load_neither_torch_nor_ray(tiny_bart_dir: Path, tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"main = runpy.run_path({str(ROOT / 'jobs' / 'presets.py')!r})['main']\n"
        f"main(['publish', {str(tiny_bart_dir)!r}, {str(tmp_path / 'store')!r}, 'tiny'])\n"
        f"preset = {str(tmp_path / 'store' / 'tiny@1')!r}\n"
        "for arguments in (['list'], ['show', preset], ['verify', preset]):\n    main(arguments)\n"
        "loaded = {'torch', 'ray', 'transformers'} & set(sys.modules)\n"
        "sys.exit(str(loaded) if loaded else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
