"""One worker of training runs, for tests: `python loop_run.py RUNS.json` with RANK and WORLD_SIZE set.

RUNS.json is a list of runs, done one after another in this process: preset, checkpoints, rows (of sources and labels),
settings of the loop, and maybe `stop_at`, a step after which the process gives up as if it were killed, `dropout`,
`lora` and `validation`.
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from s2s_ray import Seq2SeqLM
from s2s_ray.nn.lora import LoraSettings, add_lora
from s2s_ray.storage import Location
from s2s_ray.training.batches import Examples, Ragged
from s2s_ray.training.checkpoint import Checkpoints
from s2s_ray.training.distributed import World
from s2s_ray.training.evaluation import Validation
from s2s_ray.training.loop import Loop, LoopSettings
from s2s_ray.training.optimizers import OptimizerSettings


class StoppedError(Exception):
    """The run was told to give up here."""


class StoppingLoop(Loop):
    """Gives up after a step, on all workers, as if it were killed."""

    stop_at: int | None = None

    def _record(self, step: int, rate: float) -> None:
        super()._record(step, rate)
        if step == self.stop_at:
            raise StoppedError


def examples_of(rows: list[list[list[int]]]) -> Examples:
    sources, labels = zip(*rows, strict=True)
    return Examples(Ragged.from_rows(sources), Ragged.from_rows(labels), 2, 1)


def run(spec: dict[str, Any], world: World | None = None) -> Loop:
    """Train as the spec says; returns the loop as it ended."""
    options = dict(spec["settings"])
    settings = LoopSettings(optimizer=OptimizerSettings(**options.pop("optimizer")), **options)
    validation = None
    if "validation" in spec:
        validation = Validation(**spec["validation"] | {"examples": examples_of(spec["validation"]["examples"])})

    def make_task() -> Seq2SeqLM:
        task = Seq2SeqLM.from_preset(spec["preset"])
        if "dropout" in spec:
            for module in (task.backbone, *task.backbone.encoder_layers, *task.backbone.decoder_layers):
                module.dropout = spec["dropout"]
        if "lora" in spec:
            add_lora(task.backbone, LoraSettings(**spec["lora"]))
        return task

    loop = StoppingLoop(
        make_task,
        examples_of(spec["rows"]),
        settings,
        Checkpoints(Location.parse(spec["checkpoints"])),
        world=world or World.current(torch.device("cpu")),
        validation=validation,
    )
    loop.stop_at = spec.get("stop_at")
    try:
        loop.run()
    except StoppedError:
        loop.writer.wait()
    return loop


if __name__ == "__main__":
    torch.set_num_threads(1)
    specs = json.loads(Path(sys.argv[1]).read_text())
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}.store", rank=rank, world_size=size)
    results = []
    for spec in specs:
        loop = run(spec)
        results.append({"log": loop.log, "evaluations": loop.evaluations, "start": loop.start})
        dist.barrier()
    if dist.get_rank() == 0:
        Path(f"{sys.argv[1]}.out").write_text(json.dumps(results))
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()
