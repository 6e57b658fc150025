"""The Ray job beside the bare engine and beside what a user would write in its place: Ray Data over transformers.

    python -m tests.benchmarks.job --workload translation --rows 1000 --repeats 2
    python -m tests.benchmarks.job --workload translation --rows 1000 --quantization int8 --batch-sizes
    python -m tests.benchmarks.job --device cuda --dtype bfloat16 --workload summarisation --rows 4096 \\
        --rows-per-unit 256 --batch-sizes 64 128 512
    python -m tests.benchmarks.job --device cuda --dtype bfloat16 --workload translation --rows 200000 \\
        --rows-per-unit 2000 --num-replicas 1 2 --batch-sizes

The model is a random one of the workload's shape whose outputs end by themselves, saved with a tokenizer; the input is
a Parquet file of texts. All run on one Ray, in turn, each model in an actor. `total` is a whole run on a Ray that is
up; `steady` is from the first row that reaches a model to the last that is written (of the engine: that is answered),
so that loading is left out. Prints a table and, last, one JSON line.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from s2s_ray.pipelines import generate
from s2s_ray.pipelines.settings import GenerateSettings
from tests.benchmarks.workload import SHAPES, WORKLOADS, Workload, make_model, make_rows, special

ROW_GROUP = 1000  # rows


@dataclass(frozen=True)
class Outcome:
    """One run: seconds, and the new tokens of each row as text."""

    total: float
    steady: float
    texts: list[str]


def save_task(folder: Path, shape_name: str, ends: bool) -> None:
    """A model of the shape with a tokenizer whose words are the ids, as transformers saves both."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    shape = SHAPES[shape_name]
    ids = special(shape)
    make_model(shape, ends=ends).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({_word(i): i for i in range(shape.vocab_size)}, unk_token=_word(3)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    around = [i for i in (ids.bos, ids.end) if i is not None]
    words.post_processor = processors.TemplateProcessing(
        single=" ".join((*map(_word, around[:-1]), "$A", _word(ids.end))),
        special_tokens=[(_word(i), i) for i in around],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=_word(ids.start),
        eos_token=_word(ids.end),
        pad_token=_word(ids.pad),
        model_max_length=shape.max_length,
    ).save_pretrained(folder)


def _word(token: int) -> str:
    return str(token) if token > 3 else f"<{token}>"  # special tokens are found inside of words too


class EngineActor:
    """The bare engine in an actor: what the job can reach at most."""

    def __init__(self, settings: GenerateSettings, threads: int | None) -> None:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import torch

        from s2s_ray.seq2seq_lm import Seq2SeqLM

        if threads:
            torch.set_num_threads(threads)
        extra = {"quantization": settings.quantization} if getattr(settings, "quantization", None) else {}
        self.task = Seq2SeqLM.from_preset(settings.preset, dtype=settings.dtype, device=settings.device, **extra)
        self.settings = self.task.generation_settings.replace(**settings.generation_changes())
        self.engine = self.task.engine(max_batch_tokens=settings.max_batch_tokens)

    def run(self, rows: list[list[int]]) -> tuple[float, list[list[int]]]:
        from s2s_ray.generation.requests import Request

        start = time.perf_counter()
        outputs: list[list[int]] = [[] for _ in rows]
        for answer in self.engine.generate(Request(i, row, self.settings) for i, row in enumerate(rows)):
            outputs[answer.request.row_id] = answer.sequences[0].token_ids
        return time.perf_counter() - start, outputs


class Naive:
    """What a user would write: one model in an actor of Ray Data, `generate` on each batch."""

    def __init__(self, preset: str, args: argparse.Namespace) -> None:
        import torch
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        if args.device == "cpu":
            torch.set_num_threads(args.threads)
        self.options = {"max_new_tokens": args.fixed_output or args.max_output, "num_beams": args.num_beams}
        self.tokenizer = AutoTokenizer.from_pretrained(preset)
        self.model = AutoModelForSeq2SeqLM.from_pretrained(preset, dtype=getattr(torch, args.dtype)).to(args.device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        begun = time.time()
        inputs = self.tokenizer(list(batch["text"]), return_tensors="pt", padding=True, return_token_type_ids=False)
        made = self.model.generate(**inputs.to(self.model.device), do_sample=False, **self.options)
        batch["summary"] = self.tokenizer.batch_decode(made, skip_special_tokens=True)
        return batch | {"begun": [begun] * len(batch["text"])}


def run_engine(rows: list[list[int]], settings: GenerateSettings, args: argparse.Namespace) -> Outcome:
    import ray

    start = time.perf_counter()
    gpus = 1 if args.device == "cuda" else 0
    threads = None if gpus else args.threads
    actor = ray.remote(num_cpus=1, num_gpus=gpus)(EngineActor).remote(settings, threads)
    ray.get(actor.run.remote(rows[:4]))
    steady, outputs = ray.get(actor.run.remote(rows))
    ray.kill(actor)
    ids = special(SHAPES[args.shape])
    texts = [" ".join(_word(token) for token in row if token not in (ids.start, ids.end, ids.pad)) for row in outputs]
    return Outcome(time.perf_counter() - start, steady, texts)


def run_job(settings: GenerateSettings) -> Outcome:
    start = time.perf_counter()
    generate.run(settings)
    total = time.perf_counter() - start
    output = Path(settings.output)
    begun = min(note.stat().st_mtime for note in output.glob("_s2s/*/attempts/*"))
    ended = max(record.stat().st_mtime for record in output.glob("_s2s/*/commit/*"))
    texts = pq.read_table([str(p) for p in sorted(output.glob("part-*.parquet"))], columns=["summary"])
    shutil.rmtree(output)
    return Outcome(total, ended - begun, texts.column("summary").to_pylist())


def run_naive(input: str, output: Path, preset: str, batch: int, args: argparse.Namespace) -> Outcome:
    import ray.data

    start = time.perf_counter()
    ray.data.read_parquet(input).map_batches(
        Naive,
        fn_constructor_args=(preset, args),
        batch_size=batch,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=1,
        num_gpus=1 if args.device == "cuda" else None,
    ).write_parquet(str(output))
    ended = time.time()
    total = time.perf_counter() - start
    table = pq.read_table(output).sort_by("id")
    shutil.rmtree(output)
    return Outcome(total, ended - min(table.column("begun").to_pylist()), table.column("summary").to_pylist())


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    shape = SHAPES[args.shape]
    rows = make_rows(shape, Workload(**{field.name: getattr(args, field.name) for field in fields(Workload)}))
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_task(folder / "preset", args.shape, ends=not args.fixed_output)
        bos = special(shape).bos is not None
        texts = [" ".join(map(str, row[bos:-1])) for row in rows]
        table = pa.table({"id": range(len(rows)), "text": texts})
        (folder / "input").mkdir()
        pq.write_table(table, folder / "input" / "rows.parquet", row_group_size=ROW_GROUP)
        with _ray(args):
            outcomes = _measure(_contestants(args, folder, rows), args.repeats)
    _report(args, outcomes)


def _contestants(args: argparse.Namespace, folder: Path, rows: list[list[int]]) -> dict[str, Callable[[], Outcome]]:
    def settings(replicas: int) -> GenerateSettings:
        extra = {"quantization": args.quantization} if args.quantization else {}
        return GenerateSettings(
            input=(str(folder / "input"),),
            output=str(folder / "job"),
            preset=str(folder / "preset"),
            num_beams=args.num_beams,
            max_target_length=args.fixed_output or args.max_output,
            dtype=args.dtype,
            device=args.device,
            num_replicas=str(replicas),
            rows_per_unit=args.rows_per_unit,
            max_batch_tokens=args.batch_tokens,
            **extra,
        )

    runs: dict[str, Callable[[], Outcome]] = {"engine": partial(run_engine, rows, settings(1), args)}
    for replicas in args.num_replicas:
        runs[f"job, {replicas} replica{'s' * (replicas > 1)}"] = partial(run_job, settings(replicas))
    for batch in args.batch_sizes:
        naive = partial(run_naive, str(folder / "input"), folder / "naive", str(folder / "preset"), batch, args)
        runs[f"map_batches, batch {batch}"] = naive
    return runs


def _ray(args: argparse.Namespace) -> Any:
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    return ray.init(num_cpus=args.num_cpus, include_dashboard=False, log_to_driver=args.verbose, logging_level="ERROR")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="translation", help="a shape and lengths by name")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="overrides the workload's")
    parser.add_argument("--rows", type=int, help="overrides the workload's")
    parser.add_argument("--num-beams", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--quantization", choices=("int8",), help="of the job and the engine")
    parser.add_argument("--threads", type=int, default=2, help="of the engine and of transformers on a CPU")
    parser.add_argument("--num-cpus", type=int, help="CPUs that Ray is told there are")
    parser.add_argument("--num-replicas", type=int, nargs="+", default=[1], help="a job with each of these")
    parser.add_argument("--rows-per-unit", type=int)
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[16, 64], help="of map_batches; empty: without")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--verbose", action="store_true", help="show what workers print")
    args = parser.parse_args(arguments)
    workload = WORKLOADS[args.workload]
    for field in fields(Workload):
        if getattr(args, field.name, None) is None:
            setattr(args, field.name, getattr(workload, field.name))
    return args


def _measure(runs: dict[str, Callable[[], Outcome]], repeats: int) -> dict[str, list[Outcome]]:
    outcomes: dict[str, list[Outcome]] = {name: [] for name in runs}
    for turn in range(repeats):
        for name, run in runs.items():
            outcome = run()
            outcomes[name].append(outcome)
            seconds = f"{outcome.total:.1f} s, steady {outcome.steady:.1f} s"
            print(f"turn {turn + 1}, {name}: {seconds}", file=sys.stderr, flush=True)
    return outcomes


def _report(args: argparse.Namespace, outcomes: dict[str, list[Outcome]]) -> None:
    reference = outcomes["engine"]
    base = statistics.median(outcome.steady for outcome in reference)
    table = {}
    print(f"{'medians':24}{'total s':>9}{'steady s':>10}{'rows/s':>9}{'of engine':>11}{'rows equal':>14}")
    for name, found in outcomes.items():
        total = statistics.median(outcome.total for outcome in found)
        steady = statistics.median(outcome.steady for outcome in found)
        equal = sum(a == b for a, b in zip(found[-1].texts, reference[-1].texts, strict=True))
        print(f"{name:24}{total:9.1f}{steady:10.2f}{args.rows / steady:9.1f}{base / steady:11.1%}{equal:8}/{args.rows}")
        table[name] = {
            "total": [outcome.total for outcome in found],
            "steady": [outcome.steady for outcome in found],
            "rows_per_second": args.rows / steady,
            "share_of_engine": base / steady,
            "rows_equal": equal,
        }
    print(json.dumps({"benchmark": "job", **vars(args), "results": table}))


if __name__ == "__main__":
    main()
