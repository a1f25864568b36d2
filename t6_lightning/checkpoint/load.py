"""A trained model and its tokenizer from a checkpoint, without Lightning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from datamodules.tokenizer import Tokenizer
from t6_lightning.checkpoint import content, files
from t6_lightning.model.t6 import T6


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode, and what it was trained with."""

    model: T6
    tokenizer: Tokenizer
    confine_to_documents: bool


def load_trained(checkpoint: Path, device: str | None = None) -> Trained:
    """The model of a checkpoint, on the GPU where there is one.

    Raises:
        BadInput: no such checkpoint, a damaged one, or one whose parts do not fit each other.
    """
    state = files.load(checkpoint)
    named = f"checkpoint {checkpoint}"
    config = content.config_of(state, named)
    content.check_weights(state["state_dict"], config, named)
    tokenizer = content.tokenizer_of(state, config, named)
    model = T6(config)
    model.load_state_dict({name.removeprefix("net."): value for name, value in state["state_dict"].items()})
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    confined = bool(state["hyper_parameters"].get("confine_to_documents", False))
    return Trained(model.to(device).eval(), tokenizer, confined)


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
