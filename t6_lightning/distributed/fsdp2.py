"""FSDP2: a model spread over the ranks, and its state put together again.

PyTorch's `fully_shard` inside Lightning's model-parallel strategy; the model knows nothing of it. Checkpoints hold
whole tensors in the order of one device, so that any strategy on any number of ranks goes on from them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from t6_lightning.checkpoint import files as checkpoint_files
from t6_lightning.checkpoint import shards as checkpoint_shards
from t6_lightning.checkpoint.shards import Pieces
from t6_lightning.common.errors import BadInput
from t6_lightning.distributed import ranks
from t6_lightning.model.t6 import T6

KEPT_SHARE = 4
"""Whole weights and gradients may take one part in so many of a device's memory."""


def shard(net: T6, mesh: DeviceMesh) -> None:
    """Spread the parameters over a mesh of one dimension: each block gathers its own, runs, and lets go of them."""
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    # Embedding and output matrix stay gathered from the forward to the backward pass.
    fully_shard(net, mesh=mesh, reshard_after_forward=False)
    for method in ("token_losses", "summed_loss"):
        register_fsdp_forward_method(net, method)


def memory(device: torch.device) -> int:
    """Bytes of memory that a device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def has_room_for_whole(net: nn.Module, device: torch.device) -> bool:
    """Whether weights and gradients of the whole model are a small part of a device's memory."""
    return KEPT_SHARE * sum(2 * p.numel() * p.element_size() for p in net.parameters()) <= memory(device)


def is_sharded(net: nn.Module) -> bool:
    """Whether the parameters are spread over ranks."""
    return isinstance(net, FSDPModule)


def whole(value: Any) -> Any:
    """A spread tensor put together on the CPU of rank 0 (None elsewhere); anything else as it is.

    Every rank must ask, in the same order.
    """
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor().detach()
    return full.cpu() if ranks.is_first() else None


def spread(value: Any, like: torch.Tensor) -> Any:
    """The same of a whole tensor as this rank holds of `like`; scalars, and where nothing is spread, as it is."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value.whole() if isinstance(value, Pieces) else value
    if isinstance(value, Pieces):
        # Sharding deals rows as torch.chunk does.
        each = -(-len(like) // like.device_mesh.size())
        first = min(each * like.device_mesh.get_local_rank(), len(like))
        rows = value.rows(first, min(first + each, len(like))).to(like.device)
        return DTensor.from_local(
            rows, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )
    # Every rank has the whole tensor, in memory mapped from the file, and takes its part: nothing is sent.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None).to(
        value.dtype
    )


def whole_model(net: T6) -> T6 | None:
    """The model for use on one device: the same one unless it is spread, else a copy on rank 0 (None elsewhere)."""
    if not is_sharded(net):
        return net
    state = {name: whole(value) for name, value in net.state_dict().items()}
    if not ranks.is_first():
        return None
    device, dtype = net.embedding.weight.device, net.embedding.weight.dtype
    with torch.random.fork_rng(devices=[]):
        copied = T6(net.config).to(dtype)
    copied.load_state_dict(state)
    return copied.to(device)


class ShardedStrategy(ModelParallelStrategy):
    """`--trainer.strategy fsdp2`: parameters, gradients and optimizer spread over all ranks.

    Lightning's strategy with one mesh dimension in use; the model has no plan for tensor parallelism. It saves
    through the same checkpoint files as every other strategy.

    Args:
        keeps_whole: gather parameters once a step and keep them, and the gradients of its micro-batches, whole until
            its last backward pass (SHARD_GRAD_OP of the first FSDP); else a block is gathered for each of its passes
            and its gradients are scattered after each (FULL_SHARD). None: where they take at most a quarter of a
            device's memory.
        writes_shards: a checkpoint is a folder, of which each rank writes its own part.
    """

    def __init__(self, keeps_whole: bool | None = None, writes_shards: bool = False, **options: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **options)
        self.keeps_whole = keeps_whole
        self.writes_shards = writes_shards

    def setup_environment(self) -> None:
        if self._device_mesh is not None:
            return  # `on_every_rank` came first
        self._data_parallel_size = self.world_size
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        averaging = [c for c in callbacks if isinstance(c, WeightAveraging | StochasticWeightAveraging)]
        if averaging:
            name = type(averaging[0]).__name__
            raise BadInput(
                f"callbacks: {name} copies the whole model, which fsdp2 spreads; use --trainer.strategy ddp"
            )
        super().setup(trainer)
        if self.keeps_whole is None:
            self.keeps_whole = has_room_for_whole(self._net, self.root_device)
        for block in self._net.blocks:
            block.set_reshard_after_forward(not self.keeps_whole)

    @property
    def _net(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module.net

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Around each micro-batch of a step but its last."""
        if not self.keeps_whole:
            yield
            return
        self._net.set_requires_gradient_sync(False)
        self._net.set_reshard_after_backward(False)
        try:
            yield
        finally:
            self._net.set_requires_gradient_sync(True)
            self._net.set_reshard_after_backward(True)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        state = self.lightning_module.state_dict()
        return state if self.writes_shards else {name: whole(value) for name, value in state.items()}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        state = optimizer.state_dict()
        if self.writes_shards:
            return state
        moments = {
            index: {name: whole(value) for name, value in of_one.items()}
            for index, of_one in state["state"].items()
        }
        return {"state": moments, "param_groups": state["param_groups"]}

    def save_checkpoint(self, checkpoint: Any, filepath: Any, storage_options: Any | None = None) -> None:
        if not self.writes_shards:
            return Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)
        rest, spread_values = checkpoint_shards.split(checkpoint, lambda value: isinstance(value, DTensor))
        mine = {name: value.to_local().detach().cpu() for name, value in spread_values.items()}
        # A row range of a larger storage would be saved with all of it.
        mine = {name: value.clone() if value.is_contiguous() else value for name, value in mine.items()}
        checkpoint_files.save_shards(rest, mine, filepath, self.global_rank, self.world_size)
        return None

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return checkpoint_files.load(checkpoint_path, whole=False)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        parts = {
            name: spread(value, own[name]) if name in own else value
            for name, value in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(parts, strict=strict)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [i for group in state["param_groups"] for i in group["params"]]
            moments = {
                i: {name: spread(value, parameter) for name, value in state["state"].get(i, {}).items()}
                for i, parameter in zip(numbers, parameters, strict=True)
            }
            optimizer.load_state_dict({"state": moments, "param_groups": state["param_groups"]})


_SPREADS = "FSDP2: parameters, gradients and optimizer in shards"
StrategyRegistry.register("fsdp2", ShardedStrategy, f"{_SPREADS}; whole in a step where memory is plenty")
StrategyRegistry.register("fsdp2_full_shard", ShardedStrategy, f"{_SPREADS}, always", keeps_whole=False)
StrategyRegistry.register(
    "fsdp2_shard_grad_op", ShardedStrategy, f"{_SPREADS} between steps", keeps_whole=True
)


def restore_weights(trainer: pl.Trainer, checkpoint: Path) -> None:
    """Put weights and optimizer of a checkpoint in place of the present ones, on every rank; nothing else."""
    state = trainer.strategy.load_checkpoint(checkpoint)
    trainer.strategy.load_model_state_dict(state)
    trainer.strategy.load_optimizer_state_dict(state)
