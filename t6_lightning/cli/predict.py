"""predict: the loss of every validation token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from t6_lightning.checkpoint.io import restoring
from t6_lightning.cli.configuration import T6CLI, build
from t6_lightning.cli.validate import required_checkpoint
from t6_lightning.common.console import console
from t6_lightning.common.files import replacing
from t6_lightning.distributed import launch, ranks
from t6_lightning.runs.folder import run_of


def main(arguments: list[str]) -> int:
    """Write the loss of every validation token to predictions.npz beside the checkpoint's run, or here."""
    cli = build(arguments)
    return launch.on_every_rank(cli.trainer, cli.model, lambda: _predict(cli))


def _predict(cli: T6CLI) -> int:
    checkpoint = ranks.first(lambda: required_checkpoint(cli))
    with restoring(checkpoint):
        batches: Any = cli.trainer.predict(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint)
    if not ranks.is_first():
        return 0  # every rank has predicted everything: a file is written once
    arrays: dict[str, Any] = {name: torch.cat([b[name] for b in batches]).numpy() for name in batches[0]}
    run = run_of(checkpoint)
    file = (run.path if run else Path.cwd()) / "predictions.npz"
    with replacing(file) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, domains=np.array(cli.datamodule.domains), **arrays)
    console.print(f"{arrays['nll'].shape[0]} windows: loss of every token in {file}", soft_wrap=True)
    return 0
