"""A trained model and its tokenizer from a checkpoint, without Lightning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from datamodules.tokenizer import Tokenizer
from t6_lightning.checkpoint import files
from t6_lightning.model.config import T6Config
from t6_lightning.model.t6 import T6


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode, and what it was trained with."""

    model: T6
    tokenizer: Tokenizer
    confine_to_documents: bool
    dtype: torch.dtype = torch.float32
    """Of its matrix products in training, and so of its cache."""


DTYPES = {"bf16": torch.bfloat16, "16": torch.float16}
"""Lightning's precision before the dash -> dtype; every other trains in float32."""


def load_trained(checkpoint: Path, device: str | None = None) -> Trained:
    """The model of a checkpoint, on the GPU where there is one.

    Raises:
        BadInput: no such checkpoint, or a damaged one.
    """
    state = files.load(checkpoint)
    model = T6(T6Config.from_dict(state["hyper_parameters"]["net"]))
    prefix = "net."
    model.load_state_dict(
        {
            name.removeprefix(prefix): value
            for name, value in state["state_dict"].items()
            if name.startswith(prefix)
        }
    )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    confined = bool(state["hyper_parameters"].get("confine_to_documents", False))
    dtype = DTYPES.get(str(state.get("precision")).partition("-")[0], torch.float32)
    return Trained(model.to(device).eval(), Tokenizer.from_json(state["tokenizer"]), confined, dtype)


def load(checkpoint: str | Path, device: str | None = None) -> tuple[T6, Tokenizer]:
    """The model of a checkpoint file (or folder of shards), in evaluation mode, and its tokenizer.

    Args:
        checkpoint: where it is.
        device: where the model goes; None: the GPU where there is one, else the CPU.

    Raises:
        BadInput: no such checkpoint, or a damaged one.
    """
    trained = load_trained(Path(checkpoint), device)
    return trained.model, trained.tokenizer
