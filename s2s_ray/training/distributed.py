"""Workers that train one model together, over torch.distributed. One process without it is a world of one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from s2s_ray.models.backbone import Backbone
from s2s_ray.nn.positions import RelativeBias
from s2s_ray.training.batches import Batch

Strategy = Literal["ddp", "fsdp"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """This worker among all: its rank, their number, its device."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def current(cls, device: torch.device) -> "World":
        """Of the initialised process group; alone when there is none."""
        if not dist.is_initialized():
            return cls(0, 1, device)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Elementwise sums over all workers, in float64."""
        if self.size == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def gather(self, value: T) -> list[T]:
        """Every worker's value, by rank; small things only."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's value."""
        return self.gather(value if self.rank == 0 else None)[0]  # type: ignore[return-value]


def distribute(backbone: Backbone, world: World, strategy: Strategy) -> nn.Module:
    """The module to call in training, on the world's device. `backbone` stays the one that holds the weights.

    "ddp" copies the model to every worker; "fsdp" shards weights, gradients and optimizer state over them, layer by
    layer (FSDP2). Alone, it is the backbone itself.
    """
    if world.size == 1:
        return backbone.to(world.device)
    if strategy == "ddp":
        backbone.to(world.device)
        devices = [world.device] if world.device.type == "cuda" else None
        return DistributedDataParallel(
            backbone, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    mesh = init_device_mesh(world.device.type, (world.size,))
    for module in backbone.modules():
        if isinstance(module, RelativeBias):  # called outside of the layer that holds it
            fully_shard(module, mesh=mesh)
    for layer in (*backbone.encoder_layers, *backbone.decoder_layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(backbone, mesh=mesh)
    for name, buffer in backbone.named_buffers():
        owner = backbone.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], buffer.to(world.device))
    return backbone


def recompute_activations(backbone: Backbone) -> None:
    """Keep only each layer's input for the backward pass and compute the rest again: less memory, about a third more
    work.
    """
    for layer in (*backbone.encoder_layers, *backbone.decoder_layers):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def compile_layers(backbone: Backbone, backend: str = "inductor") -> None:
    """Compile each layer, one program for all encoder layers and one for all decoder layers, whatever the shapes."""
    torch._dynamo.config.optimize_ddp = False  # it would cut a large layer's program to let gradients out earlier
    for layer in (*backbone.encoder_layers, *backbone.decoder_layers):
        layer.compile(dynamic=True, fullgraph=True, backend=backend)


def freeze_unreached(backbone: Backbone, pad: int) -> list[str]:
    """Freeze and name the parameters that no loss depends on (an untied model's spare table): workers would wait for
    their gradients.
    """
    batch = Batch.empty(pad).to(next(backbone.parameters()).device)
    backbone(batch.inputs).sum().backward()
    unreached = [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
    for name, parameter in backbone.named_parameters():
        parameter.grad = None
        if name in unreached:
            parameter.requires_grad_(False)
    return unreached


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; all workers must ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, tensor: Tensor) -> Tensor:
    """`value`, which every worker holds in full, in the sharding and on the device of `tensor`."""
    if isinstance(tensor, DTensor):
        value = value.to(tensor.device)
        return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return value.to(tensor.device)


def optimizer_tensors(optimizer: torch.optim.Optimizer, backbone: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """("parameter/key", whole tensor) of the optimizer's state, in the parameters' order; on all workers together."""
    for name, parameter in backbone.named_parameters():
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            yield f"{name}/{key}", full(torch.as_tensor(value))


def load_optimizer(optimizer: torch.optim.Optimizer, backbone: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` gave, in whatever number of workers there are now."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        by_name.setdefault(name, {})[key] = value
    for name, parameter in backbone.named_parameters():
        for key, value in by_name.get(name, {}).items():
            same_shape = value.shape == parameter.shape and key != "step"
            device = parameter.device if key != "step" else value.device
            optimizer.state[parameter][key] = like(value, parameter.detach()) if same_shape else value.to(device)
