"""How many tokens make a step, and when validation comes: said in tokens, never in epochs."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from t6_lightning.common.errors import require


class Cadence(pl.Callback):
    """Derives gradient accumulation from tokens per step, and keeps the data's position.

    Args:
        tokens_per_step: tokens of one optimizer step over all ranks, a multiple of
            data.batch_size · context · ranks; null takes one micro-batch.
        validate_every_tokens: training tokens between validations; the last step is always validated.
        log_every_steps: optimizer steps between logged training metrics.
    """

    def __init__(
        self,
        tokens_per_step: int | None = None,
        validate_every_tokens: int = 1_000_000,
        log_every_steps: int = 10,
    ) -> None:
        for name, value in (
            ("tokens_per_step", 1 if tokens_per_step is None else tokens_per_step),
            ("validate_every_tokens", validate_every_tokens),
            ("log_every_steps", log_every_steps),
        ):
            require(value >= 1, f"cadence.{name}", value, "it must be at least 1")
        self.tokens_per_step = tokens_per_step
        self.validate_every_tokens = validate_every_tokens
        self.log_every_steps = log_every_steps

    def steps(self, tokens: int) -> int:
        """Optimizer steps that see about `tokens` tokens, at least one."""
        assert self.tokens_per_step is not None, "known from setup on"
        return max(1, round(tokens / self.tokens_per_step))

    def resolve(self, batch_size: int, context: int, world_size: int) -> int:
        """Micro-batches per optimizer step.

        Raises:
            BadInput: tokens_per_step is no multiple of one micro-batch on every rank.
        """
        micro = batch_size * context * world_size
        self.tokens_per_step = self.tokens_per_step or micro
        require(
            self.tokens_per_step >= micro and self.tokens_per_step % micro == 0,
            "cadence.tokens_per_step",
            self.tokens_per_step,
            f"it must be a multiple of batch size {batch_size} · context {context} · {world_size} ranks = {micro}",
        )
        return self.tokens_per_step // micro

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        trainer.accumulate_grad_batches = self.resolve(data.batch_size, data.context, trainer.world_size)
        # Lightning counts validation intervals in micro-batches.
        trainer.check_val_every_n_epoch = None
        trainer.val_check_interval = self.steps(self.validate_every_tokens) * trainer.accumulate_grad_batches

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Count the micro-batches before the checkpoint as if there had always been as many to a step as now.

        Lightning tells by their number when a step ends and when validation comes.
        """
        if "loops" not in checkpoint or trainer.state.fn != "fit":
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        micro_batches = checkpoint["global_step"] * trainer.accumulate_grad_batches
        for counts in (progress["total"], progress["current"]):
            counts.update(dict.fromkeys(counts, micro_batches))

    def validation_due(self, trainer: pl.Trainer) -> bool:
        """Whether validation follows the optimizer step just taken."""
        step = trainer.global_step
        return step == trainer.max_steps or step % self.steps(self.validate_every_tokens) == 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        data.samples += len(batch["tokens"]) * trainer.world_size
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True  # which makes Lightning validate the last step too


def stepped(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether this micro-batch ended an optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0
