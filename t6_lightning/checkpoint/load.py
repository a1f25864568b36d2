"""A trained model and its tokenizer from a checkpoint, without Lightning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from datamodules.tokenizer import Tokenizer
from t6_lightning.checkpoint import content, files
from t6_lightning.common.errors import BadInput
from t6_lightning.model.t6 import T6

DTYPES = {"bf16": torch.bfloat16, "16": torch.float16}
"""Lightning's precision before the dash -> dtype; every other trains in float32."""


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode, and what it was trained with.

    Attributes:
        checkpoint: the file or folder that it was read from.
        model: on the device where it runs.
        saved_tokenizer: None in a checkpoint that was imported without one.
        confine_to_documents: as in training.
        dtype: of its matrix products in training, and so of its cache.
    """

    checkpoint: Path
    model: T6
    saved_tokenizer: Tokenizer | None
    confine_to_documents: bool
    dtype: torch.dtype = torch.float32

    @property
    def tokenizer(self) -> Tokenizer:
        """What text is read and written with.

        Raises:
            BadInput: the checkpoint has none.
        """
        if self.saved_tokenizer is None:
            raise BadInput(
                f"checkpoint {self.checkpoint} has no tokenizer, which reading and writing text needs: "
                "import it again with --tokenizer NAME_OR_FOLDER"
            )
        return self.saved_tokenizer


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
    dtype = DTYPES.get(str(state.get("precision")).partition("-")[0], torch.float32)
    return Trained(checkpoint, model.to(device).eval(), tokenizer, confined, dtype)


def load(checkpoint: str | Path, device: str | None = None) -> tuple[T6, Tokenizer]:
    """The model of a checkpoint file (or folder of shards), in evaluation mode, and its tokenizer.

    Args:
        checkpoint: where it is.
        device: where the model goes; None: the GPU where there is one, else the CPU.

    Raises:
        BadInput: no such checkpoint, a damaged one, or one without a tokenizer, whose model `load_trained` gives.
    """
    trained = load_trained(Path(checkpoint), device)
    return trained.model, trained.tokenizer
