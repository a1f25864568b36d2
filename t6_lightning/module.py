"""The LightningModule: steps, optimizer and schedule around a T6."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from t6_lightning.errors import BadInput
from t6_lightning.metrics import LanguageModelMetrics
from t6_lightning.model.config import T6Config
from t6_lightning.model.t6 import T6
from t6_lightning.optim import AdamWConfig, Cosine, Schedule


class T6Module(pl.LightningModule):
    """Trains a T6 on batches of `tokens`, `targets`, `documents`, `n_bytes` and `domain`.

    Args:
        net: the model.
        optimizer: AdamW's settings.
        schedule: learning rate over the run.
        confine_to_documents: attention stays inside each document of a packed window and positions restart
            there; off, as the paper trains, windows are read as one text.
        compile: compile one block and reuse it for all layers.
    """

    net: T6

    def __init__(
        self,
        net: T6Config,
        optimizer: AdamWConfig,
        schedule: Schedule | None = None,
        confine_to_documents: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.config = net
        self.optimizer_config = optimizer
        self.schedule = schedule or Cosine()
        self.confine_to_documents = confine_to_documents
        self.compile_blocks = compile
        self.initial_weights: dict[str, torch.Tensor] | None = None
        self.figures: dict[str, float] = {}
        """`val/*` of the last validation, in full precision."""
        self.grad_norm = torch.tensor(float("nan"))
        # Plain types only: checkpoints are read without unpickling code.
        plain = {"net": net.to_dict(), "confine_to_documents": confine_to_documents}
        self.save_hyperparameters(plain, logger=False)

    def configure_model(self) -> None:
        if hasattr(self, "net"):
            return
        self.net = T6(self.config)
        if self.initial_weights is not None:
            self.net.load_state_dict(self.initial_weights)
        if self.compile_blocks:
            for block in self.net.blocks:
                block.compile()

    def check_tokenizer(self, data: Any) -> None:
        """Refuse data whose token ids have no row in the embedding.

        Raises:
            BadInput: the tokenizer has more symbols than the model.
        """
        if data.tokenizer.vocab_size > self.config.vocab_size:
            raise BadInput(
                f"model.net.vocab_size={self.config.vocab_size} is not possible: the tokenizer "
                f"{data.tokenizer_spec!r} has {data.tokenizer.vocab_size} symbols, and each needs a row"
            )

    def setup(self, stage: str) -> None:
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        self.check_tokenizer(data)
        self.metrics = LanguageModelMetrics(data.domains)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        checkpoint["tokenizer"] = data.tokenizer.to_json()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer_config.build(self)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    @property
    def learning_rate(self) -> float:
        """Of the optimizer step that is being taken."""
        factor = self.schedule.factor(self.trainer.global_step, self.trainer.max_steps)
        return self.optimizer_config.lr * factor

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning's own clipping refuses fused optimizers under mixed precision; the norm is wanted anyway.
        limit = gradient_clip_val or float("inf")
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters(), limit)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self._token_losses(batch).mean()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        losses = self._token_losses(batch)
        self.metrics.update(losses, batch["targets"], batch["n_bytes"], batch["domain"])

    def on_validation_epoch_end(self) -> None:
        self.figures = {f"val/{name}": value for name, value in self.metrics.compute().items()}
        self.metrics.reset()
        self.log_dict(self.figures, logger=False)  # for callbacks that watch a metric; in float32

    def test_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> dict[str, torch.Tensor]:
        """Negative log-likelihood in nats of every token of the window (B, T), with its target and domain."""
        return {"nll": self._token_losses(batch), "targets": batch["targets"], "domain": batch["domain"]}

    def _token_losses(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        documents = batch["documents"] if self.confine_to_documents else None
        return self.net.token_losses(batch["tokens"], batch["targets"], documents)
