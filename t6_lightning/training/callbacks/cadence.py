"""How many tokens make a step, and when validation comes: said in tokens, never in epochs."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping

from t6_lightning.common.errors import BadInput, require


class Cadence(pl.Callback):
    """Derives gradient accumulation, validation and logging intervals of the Trainer from numbers of tokens.

    Needs a data module that says its `batch_size` and `context`, as those of `datamodules` do. A run may go on with
    other numbers of ranks or windows per micro-batch: the tokens of a step stay the same.

    Args:
        tokens_per_step: tokens of one optimizer step over all ranks, a multiple of
            data.batch_size · context · ranks; null takes one micro-batch, or as many as the Trainer accumulates.
        validate_every_tokens: training tokens between validations; the last step is always validated. Null leaves
            it to the Trainer's own settings.
        log_every_steps: optimizer steps between logged training metrics; sets the Trainer's log_every_n_steps.
    """

    def __init__(
        self,
        tokens_per_step: int | None = None,
        validate_every_tokens: int | None = 1_000_000,
        log_every_steps: int = 10,
    ) -> None:
        for name, value in (
            ("tokens_per_step", 1 if tokens_per_step is None else tokens_per_step),
            ("validate_every_tokens", 1 if validate_every_tokens is None else validate_every_tokens),
            ("log_every_steps", log_every_steps),
        ):
            require(value >= 1, f"cadence.{name}", value, "it must be at least 1")
        self.tokens_per_step = tokens_per_step
        self.validate_every_tokens = validate_every_tokens
        self.log_every_steps = log_every_steps
        self._micro_batch_tokens = 0

    def micro_batches(self, batch_size: int, context: int, world_size: int) -> int:
        """Micro-batches per rank of an optimizer step.

        Raises:
            BadInput: tokens_per_step is no multiple of one micro-batch on every rank.
        """
        micro = batch_size * context * world_size
        tokens = self.tokens_per_step or micro
        require(
            tokens >= micro and tokens % micro == 0,
            "cadence.tokens_per_step",
            tokens,
            f"it must be a multiple of batch size {batch_size} · context {context} · {world_size} ranks = {micro}",
        )
        return tokens // micro

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if not (hasattr(data, "batch_size") and hasattr(data, "context")):
            raise BadInput(
                f"Cadence is not possible with {type(data).__name__ if data else 'loaders alone'}: it needs a data "
                "module with `batch_size` and `context`; set the Trainer's accumulate_grad_batches and "
                "val_check_interval instead"
            )
        self._micro_batch_tokens = data.batch_size * data.context * trainer.world_size
        if self.tokens_per_step is None:
            self.tokens_per_step = self._micro_batch_tokens * trainer.accumulate_grad_batches
        trainer.accumulate_grad_batches = self.micro_batches(
            data.batch_size, data.context, trainer.world_size
        )
        trainer.log_every_n_steps = self.log_every_steps  # pyright: ignore[reportAttributeAccessIssue]
        if self.validate_every_tokens is not None:
            # Lightning counts validation intervals in micro-batches.
            steps = max(1, round(self.validate_every_tokens / self.tokens_per_step))
            trainer.check_val_every_n_epoch = None
            trainer.val_check_interval = steps * trainer.accumulate_grad_batches
            _check_order(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Tokens of a micro-batch over all ranks, and of a step."""
        return {"micro_batch_tokens": self._micro_batch_tokens, "tokens_per_step": self.tokens_per_step}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Count the micro-batches before the checkpoint as if there had always been as many to a step as now.

        Lightning tells by their number when a step ends and when validation comes. The data begins a new epoch too
        where a micro-batch has another size.
        """
        if "loops" not in checkpoint or trainer.state.fn != "fit":
            return
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        place = checkpoint.get(type(data).__qualname__, {})
        is_same = checkpoint.get("callbacks", {}).get(self.state_key) == self.state_dict()
        if is_same and "epoch_start" not in place:
            return  # data of the user's own: Lightning's counts are right
        loops = checkpoint["loops"]["fit_loop"]
        batches = loops["epoch_loop.batch_progress"]
        of_run = checkpoint["global_step"] * trainer.accumulate_grad_batches
        of_epoch = (place["samples"] - place["epoch_start"]) // place["batch"] if is_same else 0
        if is_same and place["length"] and of_epoch == place["length"]:
            of_epoch = 0
            for counts in loops["epoch_progress"].values():
                counts.update(dict.fromkeys(counts, counts["ready"]))
        for counts, number in ((batches["total"], of_run), (batches["current"], of_epoch)):
            counts.update(dict.fromkeys(counts, number))
        batches["is_last_batch"] = False
        # Lightning counts the step of the last micro-batch again where it skips a validation that is done.
        skips = self.validate_every_tokens is not None and of_run % trainer.val_check_interval == 0
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"] - skips

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True  # which makes Lightning validate and log the last step too


def _check_order(trainer: pl.Trainer) -> None:
    """EarlyStopping decides in its own `setup` whether it looks after validations or at the ends of epochs.

    Raises:
        BadInput: one stands before Cadence, and has decided by a setting that Cadence changes.
    """
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(callback, EarlyStopping) and callback._check_on_train_epoch_end:
            raise BadInput(
                "callbacks: EarlyStopping before Cadence looks at ends of epochs only; put it after Cadence, or "
                "set check_on_train_epoch_end=False"
            )


def stepped(trainer: pl.Trainer) -> bool:
    """Whether the present micro-batch ended an optimizer step."""
    return not trainer.fit_loop._should_accumulate()


def validation_follows(trainer: pl.Trainer) -> bool:
    """Whether Lightning validates after the present micro-batch, before the next is read."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
