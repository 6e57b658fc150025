"""Who generates in the benchmarks: we and our peers, each with its settings to sweep, all on one saved model.

A contestant is made, warmed up, timed and dropped, so that the memory of one does not weigh on the next.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from s2s_ray import models
from s2s_ray.generation.engine import Engine, EngineStats
from s2s_ray.generation.requests import Request
from s2s_ray.generation.settings import GenerationSettings
from s2s_ray.models.loading import DTYPES, build_backbone
from tests.benchmarks.workload import SHAPES, Special, special

Outputs = list[list[int]]
Run = Callable[[int | None], Outputs]  # over all rows, or the first so many; new tokens with the end token
_WIDTHS = 128  # sources are padded to a multiple for a static cache: each width is compiled


@dataclass(frozen=True)
class Task:
    """What all contestants do."""

    folder: Path  # a model as transformers saves it
    rows: list[list[int]]
    args: argparse.Namespace

    @property
    def ids(self) -> Special:
        return special(SHAPES[self.args.shape])

    @property
    def max_new_tokens(self) -> int:
        return int(self.args.fixed_output or self.args.max_output)

    def batches(self, size: int, count: int | None) -> Iterator[list[int]]:
        """Indices of the first `count` rows, longest source first, so many at a time."""
        order = sorted(range(len(self.rows))[:count], key=lambda i: -len(self.rows[i]))
        return (order[start : start + size] for start in range(0, len(order), size))

    def until_end(self, tokens: list[int]) -> list[int]:
        return tokens[: tokens.index(self.ids.end) + 1] if self.ids.end in tokens else tokens


@dataclass(frozen=True)
class Contestant:
    """One set of settings of one peer; `enter` is a context that gives its Run. compiled: warmed up by a whole run."""

    name: str
    settings: str
    enter: Callable[[], Any]
    compiled: bool = False

    @property
    def label(self) -> str:
        return f"{self.name}, {self.settings}" if self.settings else self.name


class MissingPeerError(Exception):
    """A peer that cannot take part, and why."""


def ours(task: Task) -> list[Contestant]:
    """The engine."""
    args = task.args
    ids = task.ids
    settings = GenerationSettings(
        max_new_tokens=task.max_new_tokens,
        num_beams=args.num_beams,
        eos_token_id=(ids.end,),
        decoder_start_token_id=ids.start,
        pad_token_id=ids.pad,
    )

    @contextmanager
    def enter() -> Iterator[Run]:
        torch.set_num_threads(args.threads)  # a CTranslate2 of one thread made that torch's number too
        config = json.loads((task.folder / "config.json").read_text())
        cls = models.task_class(config["model_type"]).backbone_cls
        backbone = build_backbone(cls, config, task.folder, dtype=DTYPES[args.dtype], device=args.device)
        backbone.quantization = args.quantization
        engine = Engine(backbone, max_slots=args.slots, max_batch_tokens=args.batch_tokens)

        def run(count: int | None) -> Outputs:
            torch.set_num_threads(args.threads)
            outputs: Outputs = [[] for _ in task.rows]
            engine.stats = EngineStats()
            for answer in engine.generate(Request(i, row, settings) for i, row in enumerate(task.rows[:count])):
                outputs[answer.request.row_id] = answer.sequences[0].token_ids
            if args.num_beams == 1:
                share = engine.stats.generated_tokens / engine.stats.slot_steps
                print(f"{share:.1%} of the slots gave a token", file=sys.stderr)
            return outputs

        yield run

    return [Contestant("s2s_ray", args.quantization or "", enter)]


def transformers(task: Task) -> list[Contestant]:
    """`generate` of transformers over batches of rows sorted by length, with each kind of cache."""
    found = []
    for cache in task.args.caches:
        for batch in task.args.batch_sizes:
            entered = _transformers(task, batch, cache)
            found.append(Contestant("transformers", f"{cache} cache, batch {batch}", entered, cache == "static"))
    return found


def _transformers(task: Task, batch: int, cache: str) -> Callable[[], Any]:
    @contextmanager
    def enter() -> Iterator[Run]:
        from transformers import AutoModelForSeq2SeqLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        args, ids = task.args, task.ids
        model = AutoModelForSeq2SeqLM.from_pretrained(task.folder, dtype=DTYPES[args.dtype]).to(args.device).eval()

        def run(count: int | None) -> Outputs:
            torch.set_num_threads(args.threads)
            outputs: Outputs = [[] for _ in task.rows]
            for chosen in task.batches(batch, count):
                width = len(task.rows[chosen[0]])
                if cache == "static":
                    width = min(-(-width // _WIDTHS) * _WIDTHS, SHAPES[args.shape].max_length)
                padded = torch.tensor([task.rows[i] + [ids.pad] * (width - len(task.rows[i])) for i in chosen])
                lengths = torch.tensor([len(task.rows[i]) for i in chosen])
                made = model.generate(
                    input_ids=padded.to(args.device),
                    attention_mask=(torch.arange(width) < lengths[:, None]).long().to(args.device),
                    max_new_tokens=task.max_new_tokens,
                    num_beams=args.num_beams,
                    do_sample=False,
                    cache_implementation=None if cache == "dynamic" else cache,
                ).tolist()
                for i, row in zip(chosen, made, strict=True):
                    outputs[i] = task.until_end(row[1:])[: task.max_new_tokens]
            return outputs

        yield run

    return enter


def ctranslate2(task: Task) -> list[Contestant]:
    """CTranslate2 on the same weights, which sorts and batches the rows itself; batch sizes in tokens or rows."""
    if importlib.util.find_spec("ctranslate2") is None:
        raise MissingPeerError("ctranslate2 is not installed")
    args = task.args
    target = task.folder / "ctranslate2"
    if not target.exists():
        _convert(task, target)
    threads = [(1, args.threads)] + ([(args.threads, 1)] if args.device == "cpu" and args.threads > 1 else [])
    return [
        Contestant(
            "ctranslate2",
            f"{_compute_type(args)}, {batch}, {inter}x{intra} threads",
            _ctranslate2(task, target, batch, inter, intra),
        )
        for inter, intra in threads
        for batch in args.ct2_batches
    ]


def _compute_type(args: argparse.Namespace) -> str:
    if not args.quantization:
        return str(args.dtype)
    return "int8" if args.device == "cpu" else f"int8_{args.dtype}"


def _convert(task: Task, target: Path) -> None:
    from ctranslate2.converters import TransformersConverter

    ids = task.ids

    class Vocabulary:
        """All that the converter asks of a tokenizer: a token's text is its id."""

        bos_token, eos_token, pad_token, unk_token = str(ids.start), str(ids.end), str(ids.pad), "3"

        def get_vocab(self) -> dict[str, int]:
            return {str(i): i for i in range(SHAPES[task.args.shape].vocab_size)}

        def convert_ids_to_tokens(self, token: int) -> str:
            return str(token)

    class Converter(TransformersConverter):  # type: ignore[misc]
        def load_model(self, model_class: Any, path: str, **options: Any) -> Any:
            model = super().load_model(model_class, path, **options)
            model.config.normalize_before, model.config.normalize_embedding = False, True
            return model

        def load_tokenizer(self, *_: Any, **__: Any) -> Vocabulary:
            return Vocabulary()

    Converter(str(task.folder)).convert(str(target))


def _ctranslate2(task: Task, model: Path, batch: str, inter: int, intra: int) -> Callable[[], Any]:
    @contextmanager
    def enter() -> Iterator[Run]:
        import ctranslate2 as ct2

        args = task.args
        translator = ct2.Translator(
            str(model), args.device, compute_type=_compute_type(args), inter_threads=inter, intra_threads=intra
        )
        kind, _, size = batch.partition(":")
        sources = [[str(token) for token in row] for row in task.rows]

        def run(count: int | None) -> Outputs:
            results = translator.translate_batch(
                sources[:count],
                batch_type=kind,
                max_batch_size=int(size),
                beam_size=args.num_beams,
                max_input_length=0,
                min_decoding_length=0,
                max_decoding_length=task.max_new_tokens,
                return_end_token=True,
            )
            return [[int(token) for token in result.hypotheses[0]] for result in results]

        yield run
        translator.unload_model()

    return enter


def keras_hub(task: Task) -> list[Contestant]:
    """KerasHub's BartSeq2SeqLM on torch, in a process (and, with --keras-python, an environment) of its own."""
    shape = SHAPES[task.args.shape]
    if shape.family != "bart" or shape.layers != shape.decoder_layers:
        raise MissingPeerError(f"keras-hub has no Seq2SeqLM of the shape {task.args.shape}")
    python = task.args.keras_python or sys.executable
    probe = "from importlib.metadata import version; print(version('keras-hub'))"
    found = subprocess.run([python, "-c", probe], check=False, capture_output=True, text=True)
    if found.returncode:
        raise MissingPeerError(f"keras-hub is not installed for {python} (--keras-python)")
    return [
        Contestant("keras-hub", f"{found.stdout.strip()}, batch {batch}", _keras_hub(task, python, batch))
        for batch in task.args.keras_batches
    ]


def _keras_hub(task: Task, python: str, batch: int) -> Callable[[], Any]:
    @contextmanager
    def enter() -> Iterator[Run]:
        args = task.args
        script = [python, "-m", "tests.benchmarks.keras_hub_peer"]
        command = [*script, str(task.folder), args.dtype, args.device, str(args.num_beams)]
        environment = os.environ | {"KERAS_BACKEND": "torch", "OMP_NUM_THREADS": str(args.threads)}
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            assert process.stdin and process.stdout

            def ask(**question: Any) -> Any:
                print(json.dumps(question), file=process.stdin, flush=True)
                answer = process.stdout.readline()  # type: ignore[union-attr]
                if not answer:
                    raise MissingPeerError("keras-hub's process ended; its messages are above")
                return json.loads(answer)

            def run(count: int | None) -> Outputs:
                outputs: Outputs = [[] for _ in task.rows]
                for chosen in task.batches(batch, count):
                    made = ask(rows=[task.rows[i] for i in chosen], length=1 + task.max_new_tokens)
                    for i, row in zip(chosen, made, strict=True):
                        outputs[i] = task.until_end(row)
                return outputs

            yield run
            process.stdin.close()

    return enter


PEERS: dict[str, Callable[[Task], list[Contestant]]] = {
    "transformers": transformers,
    "ctranslate2": ctranslate2,
    "keras-hub": keras_hub,
}
