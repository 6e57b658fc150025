"""Attack the files of presets: whatever is changed in them, loading gives a task or a typed error, and soon.

    python -m tests.presets.fuzz --cases 5000 --seed 3

Takes tiny presets (BART with tokenizer.json, T5 and M2M100 with SentencePiece models, Marian with two, shards, a
directory of keras-hub), changes one or two places of one file (a value of its JSON to one of another type, size or
depth; bytes; a cut), loads it and tokenises a text. Each preset's cases run in a process of their own with 4 GiB more
memory than torch itself maps, and 20 s a case. Prints every case that ended with anything but a task or an S2SRayError,
then one JSON line. Ends with 1 if there was one.
"""

import argparse
import copy
import json
import multiprocessing
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s2s_ray.errors import S2SRayError

HERE = Path(__file__).parent
SECONDS, EXTRA_BYTES = 20, 4 * 2**30
HOSTILE: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 7, 2**16, 2**31, 2**63, 10**30, 10**400, 0.5, -1e308, "", "x", "\ud800", "a" * 5000),
    *("../../etc/passwd", "</s>", "\0", [], {}, [[]], {"": ""}, [1, "a", None], {"content": 3}, [-1], ["<unk>"] * 3),
)


def change_json(data: bytes, rng: random.Random) -> bytes:
    """One or two values replaced, taken out, doubled, or put under another name."""
    tree = json.loads(data)
    if "model" in tree and "added_tokens" in tree and rng.random() < 0.7:  # of a tokenizer.json, the small parts
        vocab = tree["model"].pop("vocab")
        tree = _changed(tree, rng)
        if isinstance(tree, dict) and isinstance(tree.get("model"), dict):
            tree["model"].setdefault("vocab", vocab)
    else:
        tree = _changed(tree, rng)
    return json.dumps(tree).encode()


def _changed(tree: Any, rng: random.Random) -> Any:
    for _ in range(rng.choice((1, 1, 2))):
        node = tree
        if not isinstance(node, (dict, list)) or not node or rng.random() < 0.02:
            return copy.deepcopy(rng.choice(HOSTILE))
        while True:
            key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            inner = node[key]
            if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.3:
                break
            node = inner
        _change(node, key, rng)
    return tree


def _change(node: Any, key: Any, rng: random.Random) -> None:
    way = rng.random()
    if way < 0.7:
        node[key] = copy.deepcopy(rng.choice(HOSTILE))
    elif way < 0.85:
        del node[key]
    elif isinstance(node, dict):
        node[rng.choice((f"{key}x", "", "extra"))] = node.pop(key)
    else:
        node.append(node[key])


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few bytes, most of them near the beginning where headers are; or a cut, a doubling, a stretch taken out."""
    if rng.random() < 0.2:
        return rng.choice((data[: rng.randrange(len(data))], data + data, data[rng.randrange(len(data)) :], b""))
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(min(len(data), rng.choice((16, 512, len(data)))))
        changed[place] = rng.choice((0, 255, 127, rng.randrange(256)))
    return bytes(changed)


def change_header(data: bytes, rng: random.Random) -> bytes:
    """The header of a safetensors file as JSON, with its length put right."""
    length = int.from_bytes(data[:8], "little")
    header = change_json(data[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def change(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    if path.suffix == ".safetensors" and rng.random() < 0.7:
        path.write_bytes(change_header(data, rng))
    elif path.suffix == ".json" and rng.random() < 0.8:
        path.write_bytes(change_json(data, rng))
    else:
        path.write_bytes(change_bytes(data, rng))


def load(directory: Path) -> None:
    """What a job does with an untrusted preset, up to the first token."""
    from s2s_ray import Seq2SeqLM

    task = Seq2SeqLM.from_preset(directory)
    assert task.preprocessor is not None
    ids, _ = task.preprocessor.encode_sources(["a <unk> b", "</s>"], 64)
    task.preprocessor.decode(ids)


def attack(preset: Path, cases: int, seed: int) -> tuple[Counter[str], list[str]]:
    """(how often each outcome, what went wrong) of changed copies of one preset."""
    outcomes, wrong = Counter[str](), []
    signal.signal(signal.SIGALRM, _too_long)
    files = sorted(path.relative_to(preset) for path in preset.rglob("*") if path.is_file())
    with tempfile.TemporaryDirectory() as root:
        for case in range(cases):
            rng = random.Random(f"{preset.name} {seed} {case}")
            directory = Path(shutil.copytree(preset, Path(root) / "preset", dirs_exist_ok=True))
            file = directory / rng.choice(files)
            change(file, rng)
            signal.alarm(SECONDS)
            try:
                load(directory)
                outcomes["loaded"] += 1
            except S2SRayError as error:
                outcomes[type(error).__name__] += 1
            except BaseException as error:
                frames = traceback.extract_tb(error.__traceback__)
                at = next(
                    (f"{f.filename.split('/')[-1]}:{f.lineno}" for f in reversed(frames) if "s2s_ray" in f.filename), ""
                )
                wrong.append(
                    f"{preset.name} case {case}, {file.name}: {type(error).__name__}: {str(error)[:150]} at {at}"
                )
            finally:
                signal.alarm(0)
    return outcomes, wrong


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def make_presets(root: Path) -> list[Path]:
    """The presets to attack, written by transformers and by keras-hub."""
    from transformers import BartConfig, M2M100Config, MarianConfig, T5Config

    from tests.models.contract import reference_model
    from tests.models.test_marian import SIZES
    from tests.models.test_t5 import SIZES as T5_SIZES
    from tests.text.family_presets import make

    scripts = (HERE.parent / "text" / "scripts.txt").read_text(encoding="utf-8").splitlines()
    made = []
    kinds: tuple[tuple[str, Any, dict[str, Any]], ...] = (
        ("t5", T5Config, T5_SIZES | {"num_layers": 1}),
        ("m2m100", M2M100Config, SIZES | {"decoder_start_token_id": 2}),
        ("marian", MarianConfig, SIZES | {"eos_token_id": 0, "decoder_start_token_id": 0}),
    )
    for family, config, sizes in kinds:
        preset = make(root, family, scripts * 20, 1200)
        size = preset.tokenizer.vocabulary_size()
        pad = preset.tokenizer.pad_token_id
        model = reference_model(config(**(sizes | {"vocab_size": size, "pad_token_id": pad})))
        model.save_pretrained(preset.directory, max_shard_size="60KB" if family == "m2m100" else "1GB")
        made.append(preset.directory)
    made.append(_bart(root / "bart", scripts, reference_model, BartConfig(**SIZES)))
    with zipfile.ZipFile(HERE / "keras_hub" / "t5.zip") as archive:
        archive.extractall(root / "keras")
    return [*made, root / "keras" / "preset"]


def _bart(directory: Path, texts: Sequence[str], reference_model: Any, config: Any) -> Path:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import BartTokenizerFast

    trainer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer.train_from_iterator(texts, vocab_size=400, special_tokens=special, show_progress=False)
    model = json.loads(trainer._tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    BartTokenizerFast(vocab=model["vocab"], merges=merges).save_pretrained(directory)
    config.vocab_size = len(model["vocab"])
    reference_model(config).save_pretrained(directory)
    return directory


def _limited_attack(preset: Path, cases: int, seed: int, results: Any) -> None:
    load(preset)  # unchanged it does; and what torch maps is mapped
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + EXTRA_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    results.send(attack(preset, cases, seed))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="changed copies in all (default 2,000)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    outcomes, wrong = Counter[str](), []
    with tempfile.TemporaryDirectory() as root:
        presets = make_presets(Path(root))
        for preset in presets:
            context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
            receiving, sending = context.Pipe(duplex=False)
            task = (preset, arguments.cases // len(presets), arguments.seed, sending)
            process = context.Process(target=_limited_attack, args=task)
            process.start()
            sending.close()
            try:
                counted, found = receiving.recv()
            except EOFError:
                process.join()
                wrong.append(f"{preset.name}: the process ended with {process.exitcode}")
                print(wrong[-1], flush=True)
                continue
            outcomes.update(counted)
            wrong += found
            print(f"{preset.name}: {dict(counted)}", *found, sep="\n", flush=True)
    print(json.dumps({"cases": arguments.cases, "outcomes": outcomes, "wrong": len(wrong)}))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
