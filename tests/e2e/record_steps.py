"""A Lightning callback that writes down every optimizer step to the last bit, and the runs it is used on.

`--trainer.callbacks+=record_steps.RecordSteps` adds it to any `fit` whose PYTHONPATH has this folder; it writes to
the folder that RECORD_STEPS names. It imports nothing of this package, so that it works with every version of it:
it relies on `step_loss` and `grad_norm` of the LightningModule, and on `sample` and `tokens` of a batch.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

STEPS = 60
BATCH, CONTEXT = 4, 32
ACCUMULATED = 2
RECORD_STEPS = "RECORD_STEPS"
FOLDER_OF_THIS_FILE = Path(__file__).parent


def settings(world: int) -> list[str]:
    """Flags of a tiny run on a CPU: dropout, two micro-batches per step, loader workers, 3 validations."""
    tokens = ACCUMULATED * world * BATCH * CONTEXT
    return [
        *("--model.net.d_model", "32", "--model.net.n_layers", "2", "--model.net.context", str(CONTEXT)),
        *("--model.net.vocab_size", "257", "--model.net.attention.n_heads", "3"),
        *("--model.net.attention.head_dim", "16", "--model.net.dropout", "0.1"),
        *("--data.tokenizer", "bytes", "--data.batch_size", str(BATCH)),
        *("--data.val_tokens", "1500", "--data.num_workers", "2"),
        *("--cadence.tokens_per_step", str(tokens), "--cadence.log_every_steps", "10"),
        *(
            "--cadence.validate_every_tokens",
            str(20 * tokens),
            "--checkpoints.every_tokens",
            str(40 * tokens),
        ),
        *("--trainer.max_steps", str(STEPS), "--trainer.accelerator", "cpu"),
        *("--trainer.callbacks+=record_steps.RecordSteps",),
    ]


def write_corpus(folder: Path) -> list[str]:
    """Write 90 documents of 6.7 kB, which 60 steps read about three times; the flags that train on them."""
    x, texts = 1, []
    for number in range(90):
        words = []
        for _ in range(2 + number % 23):
            x = (1_103_515_245 * x + 12_345) % 2**31
            words.append(("grün", "step", "of", "∑", "loss", "tensor", "a")[(x >> 16) % 7])
        texts.append(f"{number} " + " ".join(words))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.jsonl").write_bytes("".join(json.dumps({"text": t}) + "\n" for t in texts[:60]).encode())
    (folder / "b.txt").write_bytes("\n".join(texts[60:]).encode())
    return [
        *("--data", "TextFiles", "--data.files", str(folder), "--data.txt_documents", "line"),
        *("--data.val_fraction", "0.2"),
    ]


def windows_at_most(folder: Path) -> int:
    """An upper bound of the training windows of `write_corpus`: all bytes and a separator per document."""
    return (sum(file.stat().st_size for file in folder.iterdir()) + 90) // CONTEXT


class RecordSteps(pl.Callback):
    """Writes one line of JSON per optimizer step, and one per validation, to a file per rank.

    `step` has the learning rate that the step used, loss, gradient norm before clipping, and of its micro-batches
    the sample ids and the first 16 hex digits of the sha256 of their tokens. Floats are in hexadecimal. The first
    line says which package was imported.
    """

    def __init__(self) -> None:
        self._samples: list[list[int]] = []
        self._tokens = hashlib.sha256()
        self._lr = float("nan")
        self._step = 0

    def _write(self, trainer: pl.Trainer, line: dict[str, Any]) -> None:
        with self._file(trainer).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _file(self, trainer: pl.Trainer) -> Path:
        return Path(os.environ[RECORD_STEPS], f"rank-{trainer.global_rank}.jsonl")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        package = sys.modules["t6_lightning"].__file__
        self._write(trainer, {"package": package, "world": trainer.world_size})
        # Neither before nor after the optimizer's own step does every version have this step's rate in its groups.
        trainer.optimizers[0].register_step_pre_hook(self._note_lr)

    def _note_lr(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        (self._lr,) = {float(group["lr"]) for group in optimizer.param_groups}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples.append(batch["sample"].tolist())
        self._tokens.update(batch["tokens"].to("cpu", torch.int64).contiguous().numpy().tobytes())
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        module: Any = pl_module
        line = {
            "step": self._step,
            "lr": self._lr.hex(),
            "loss": float(module.step_loss).hex(),
            "grad_norm": float(module.grad_norm).hex(),
            "samples": self._samples,
            "tokens": self._tokens.hexdigest()[:16],
        }
        self._write(trainer, line)
        self._samples, self._tokens, self._lr = [], hashlib.sha256(), float("nan")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loss = float(trainer.callback_metrics["val/loss"])
        self._write(trainer, {"validated_at": trainer.global_step, "val_loss": loss.hex()})


def lines_of(folder: Path, rank: int) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """What a rank wrote: the first line, the steps, the validations."""
    first, *rest = map(json.loads, (folder / f"rank-{rank}.jsonl").read_text().splitlines())
    return first, [line for line in rest if "step" in line], [line for line in rest if "step" not in line]
