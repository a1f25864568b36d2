"""The optimizer as a plain value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from t6_lightning.common.errors import require
from t6_lightning.distributed import ranks

# Saved configurations of version 0.1.0 name these here.
from t6_lightning.training.schedule import Cosine as Cosine
from t6_lightning.training.schedule import Schedule as Schedule
from t6_lightning.training.schedule import WarmupStableDecay as WarmupStableDecay


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW (Loshchilov & Hutter, 2019), fused where the device has it.

    Attributes:
        lr: peak learning rate, which the schedule multiplies.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times the current learning rate.
        decay: "all" decays every parameter, as the reference does; "matrices" spares norms and the embedding.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: Literal["all", "matrices"] = "all"

    def __post_init__(self) -> None:
        require(self.lr > 0, "optimizer.lr", self.lr, "it must be above 0")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "it must be 0 or above")
        require(self.decay in ("all", "matrices"), "optimizer.decay", self.decay, "choose all or matrices")
        require(all(0 <= beta < 1 for beta in self.betas), "optimizer.betas", self.betas, "each is in [0, 1)")

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        """The optimizer over all parameters of `model`, in a decayed and an undecayed group."""
        decayed, spared = [], []
        embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        for parameter in model.parameters():
            is_matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
            (decayed if self.decay == "all" or is_matrix else spared).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": spared, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        optimizer = AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
        optimizer.register_load_state_dict_pre_hook(_keep_settings)
        optimizer.register_load_state_dict_post_hook(_copy_moments)
        return optimizer


class AdamW(torch.optim.AdamW):
    """PyTorch's, which updates a rank's own part of spread parameters as plain tensors.

    Elements do not mix, so that the numbers are the same; spread tensors only take the host longer.
    """

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [ranks.local(tensor) for tensor in tensors]
        return has_complex


def _keep_settings(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Take moments from a checkpoint, and betas, weight decay and the like from the present configuration."""
    present = optimizer.param_groups
    if len(present) != len(state["param_groups"]):
        return state  # torch says that they differ
    groups = [
        saved | {name: value for name, value in own.items() if name != "params"}
        for saved, own in zip(state["param_groups"], present, strict=True)
    ]
    return state | {"param_groups": groups}


def _copy_moments(optimizer: torch.optim.Optimizer) -> None:
    """Take moments on the CPU out of the memory that a checkpoint's file is mapped to.

    The first step would write to it, and the system copy it page by page: several times slower.
    """
    for moments in optimizer.state.values():
        for name, value in moments.items():
            if value.device.type == "cpu":
                moments[name] = value.clone()
