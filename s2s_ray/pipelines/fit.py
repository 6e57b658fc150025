"""`Seq2SeqLM.fit` on a Ray cluster: tokenised by Ray Data, trained by training/fit.py in every worker of a group.

Nothing needs storage that all nodes share: token ids and the task travel through Ray's object store, and the trained
weights come back with the result.
"""

import copy
import inspect
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from s2s_ray.errors import InputError, SettingsError
from s2s_ray.pipelines.cluster import TASK_CPUS, execution, ray_session
from s2s_ray.pipelines.workers import Event, run_workers
from s2s_ray.storage import Location

if TYPE_CHECKING:
    import pyarrow as pa
    import ray
    import ray.data
    import torch

    from s2s_ray.seq2seq_lm import Seq2SeqLM
    from s2s_ray.text.preprocessor import Seq2SeqLMPreprocessor
    from s2s_ray.training.batches import Batch
    from s2s_ray.training.fit import History
    from s2s_ray.training.inputs import DataSettings, InMemory


def fit(
    task: "Seq2SeqLM",
    x: Any = None,
    y: Any = None,
    *,
    num_workers: int = 1,
    cpus_per_worker: float = 1.0,
    device: str | None = None,
    **options: Any,
) -> "History":
    """Train the task's backbone in place on `num_workers` workers, with the options of `training.fit.fit`.

    x and `validation_data` may be Ray Datasets with `text_column` and `summary_column`, which the cluster tokenises,
    or what `fit` takes but for iterables. The workers share the rows of every batch, so their number changes the result
    by rounding and the draws of dropout alone. device: "cpu", "cuda", or None for a GPU a worker where the cluster has
    some. Callbacks are copied to every worker and called there. When an error is raised, the task is as before.

    Raises SettingsError for options that cannot be had on workers, InputError for the data, InfrastructureError when a
    worker is lost, and what `training.fit.fit` raises.
    """
    from safetensors.torch import load
    from torch.optim import Optimizer

    from s2s_ray.training import fit as local

    inspect.signature(local.fit).bind(task, x, y, **options)  # an unknown name is a TypeError, as anywhere
    if isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 1:
        raise SettingsError(f"num_workers must be a whole number of at least 1. Received: {num_workers!r}")
    if device not in (None, "cpu", "cuda"):
        raise SettingsError(f'device must be "cpu", "cuda" or None. Received: {device!r}')
    if isinstance(task.optimizer, Optimizer):
        raise SettingsError(
            "with num_workers the optimizer must be a name, OptimizerSettings or a function of the parameters: a torch "
            f"Optimizer holds the weights of this process. Received: {type(task.optimizer).__name__}"
        )
    with ray_session(None), tempfile.TemporaryDirectory() as directory:
        config = _config(task, x, y, **options)
        history, state = run_workers(
            _train,
            config,
            num_workers=(num_workers, num_workers),
            cpus_per_worker=cpus_per_worker,
            device=device,
            max_failures=0,
            storage=Location.parse(directory) / "ray",
            show=[partial(_show, options.get("epochs", 1), options.get("verbose", "auto"))],
        )
    task.backbone.train()  # forgets the weights that were packed for generation
    task.backbone.load_state_dict(load(state))
    task.backbone.eval()
    return history  # type: ignore[no-any-return]


def _config(
    task: "Seq2SeqLM",
    x: Any,
    y: Any,
    *,
    sample_weight: Any = None,
    validation_data: Any = None,
    validation_split: float = 0.0,
    validation_batch_size: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What the workers are given, the data tokenised; its large parts are references into Ray's object store."""
    import ray

    from s2s_ray.training.fit import open_both
    from s2s_ray.training.inputs import DataSettings, Stream

    if validation_split and _is_dataset(x):
        raise SettingsError(
            "validation_split is for data that is no Ray Dataset; give validation_data, such as the second of "
            f"x.train_test_split({validation_split})"
        )
    names = {field.name for field in fields(DataSettings)}
    settings = DataSettings(**{name: value for name, value in options.items() if name in names and value is not None})
    plain = settings.for_validation(validation_batch_size)
    x, validation_data = (
        _tokenised(data, task.preprocessor, chosen) if _is_dataset(data) else data
        for data, chosen in ((x, settings), (validation_data, plain))
    )
    opened = open_both(x, y, sample_weight, validation_data, validation_split, task.preprocessor, settings, plain)
    if any(isinstance(data, Stream) for data in opened):
        raise SettingsError(
            "with num_workers, x must be a Ray Dataset, texts, a table, Parquet paths or preprocessed arrays: this "
            "process alone can read an iterable. Received: an iterable"
        )
    portable = copy.copy(task)
    task.backbone.unpack()  # what is packed for generation may be pointers into this process
    portable.backbone = copy.deepcopy(task.backbone).cpu()
    portable._engines = {}
    data, validation = map(ray.put, opened)
    return {"task": ray.put(portable), "data": data, "validation": validation, "options": options}


def _is_dataset(data: Any) -> bool:
    import ray.data

    return isinstance(data, ray.data.Dataset)


@dataclass
class Tokenised:
    """TrainingData that Ray Data tokenised: blocks in the object store, which the workers of a node share."""

    blocks: "list[ray.ObjectRef[pa.Table]]"
    pad: int
    widths: tuple[int, int] | None
    settings: "DataSettings"
    _opened: "InMemory | None" = None

    def batches(self, epoch: int) -> "Iterator[Batch]":
        return self._data().batches(epoch)

    def steps(self, epoch: int) -> int | None:
        return self._data().steps(epoch)

    def _data(self) -> "InMemory":
        import ray

        from s2s_ray.training.inputs import InMemory
        from s2s_ray.training.shards import examples_of

        if self._opened is None:
            batches = [table.combine_chunks().to_batches()[0] for table in ray.get(self.blocks) if len(table)]
            examples = examples_of(batches, self.pad)
            examples.widths = self.widths
            self._opened = InMemory(examples, self.settings)
        return self._opened


def _tokenised(
    dataset: "ray.data.Dataset", preprocessor: "Seq2SeqLMPreprocessor | None", settings: "DataSettings"
) -> Tokenised:
    """In the order of the dataset, so that the same seed gives the same batches."""
    from s2s_ray.training.inputs import CHUNK_ROWS, fixed_widths, required

    preprocessor = required(preprocessor)
    mapped = dataset.map_batches(
        partial(_encode, preprocessor=preprocessor, settings=settings),
        batch_format="pyarrow",
        batch_size=CHUNK_ROWS,
        num_cpus=TASK_CPUS,
    )
    order = mapped.context.execution_options
    before, order.preserve_order = order.preserve_order, True
    try:
        with execution(mapped):
            mapped = mapped.materialize()
            blocks, rows = mapped.to_arrow_refs(), mapped.count()
    finally:
        order.preserve_order = before
    if not rows:
        raise InputError("the data must hold at least one pair. Received: an empty Dataset")
    return Tokenised(blocks, preprocessor.tokenizer.pad_token_id, fixed_widths(preprocessor, settings), settings)


def _encode(table: "pa.Table", preprocessor: "Seq2SeqLMPreprocessor", settings: "DataSettings") -> "pa.Table":
    """Columns of texts to those of training/shards.py. Runs as a CPU task."""
    import pyarrow as pa

    from s2s_ray.training.inputs import encode, from_columns

    try:
        examples = encode([from_columns(table, settings)], preprocessor, settings)
    except InputError as error:
        raise InputError(f"in a block of the Dataset: {error}") from None  # `execution` sees the first of a chain
    sides = (examples.sources, examples.labels)
    lists = [pa.ListArray.from_arrays(pa.array(side.starts, pa.int32()), pa.array(side.flat)) for side in sides]
    return pa.table({"source": lists[0], "labels": lists[1], "start": pa.array(examples.start)})


def _train(config: dict[str, Any], device: "torch.device", emit: Callable[[Event], None]) -> Any:
    """A worker's part; rank 0 returns the history and the weights, as bytes since Ray Train takes no tensors."""
    import ray
    from safetensors.torch import save

    from s2s_ray.training.callbacks import Callback
    from s2s_ray.training.distributed import World
    from s2s_ray.training.fit import fit as train

    class Report(Callback):
        def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
            emit({"kind": "epoch", "epoch": epoch, "logs": dict(logs)})

    world = World.current(device)
    task, data, validation = (ray.get(config[name]) for name in ("task", "data", "validation"))
    task.backbone.to(device)
    options = dict(config["options"])
    callbacks = [*(options.pop("callbacks", None) or ()), *([] if world.rank else [Report()])]
    options |= {"callbacks": callbacks, "verbose": 0, "validation_data": validation, "world": world}
    history = train(task, data, **options)
    if world.rank:
        return None
    return history, save({name: x.cpu().contiguous() for name, x in task.backbone.state_dict().items()})


def _show(epochs: int, verbose: Any, event: Event) -> None:
    from s2s_ray.training.progress import Progress

    Progress(2 if verbose else 0, event["epoch"], epochs, None).close(event["logs"])
