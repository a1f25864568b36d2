"""The LightningModule: steps, optimizer and schedule around a T6."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch

from t6_lightning.common.errors import BadInput
from t6_lightning.distributed import fsdp2, ranks
from t6_lightning.model.config import T6Config
from t6_lightning.model.t6 import IGNORE, T6
from t6_lightning.training import recompute
from t6_lightning.training.metrics import LanguageModelMetrics
from t6_lightning.training.optim import AdamWConfig, Cosine, Schedule
from t6_lightning.training.recompute import Recompute


class T6Module(pl.LightningModule):
    """Trains a T6 on batches of `tokens`, `targets`, `documents`, `n_bytes` and `domain`.

    Args:
        net: the model.
        optimizer: AdamW's settings.
        schedule: learning rate over the run.
        confine_to_documents: attention stays inside each document of a packed window and positions restart
            there; off, as the paper trains, windows are read as one text.
        compile: compile one block and reuse it for all layers.
        recompute: what the backward pass computes anew instead of keeping: "none"; "selective", what is cheap;
            "full", each block but its input.
    """

    net: T6

    def __init__(
        self,
        net: T6Config,
        optimizer: AdamWConfig,
        schedule: Schedule | None = None,
        confine_to_documents: bool = False,
        compile: bool = False,
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        self.config = net
        self.optimizer_config = optimizer
        self.schedule = schedule or Cosine()
        self.confine_to_documents = confine_to_documents
        self.compile_blocks = compile
        self.recompute_choice: Recompute = recompute
        self.initial_weights: dict[str, torch.Tensor] | None = None
        self.goes_on = False
        """Whether a checkpoint's weights will take the place of random ones: these are not drawn then, which takes
        seconds at size; orthogonal ones still are."""
        self.figures: dict[str, float] = {}
        """`val/*` of the last validation, in full precision."""
        self.grad_norm = torch.tensor(float("nan"))
        self.step_sums = torch.zeros(2, dtype=torch.float64)
        """Nats and counted tokens of the last optimizer step, over all its micro-batches and ranks."""
        self.accepts_step: Callable[[torch.Tensor, torch.Tensor], bool] | None = None
        """Given loss and gradient norm of a step, says whether it may change the weights."""
        self._sums: torch.Tensor | None = None
        self._positions = 0
        # Plain types only: checkpoints are read without unpickling code.
        plain = {"net": net.architecture(), "confine_to_documents": confine_to_documents}
        self.save_hyperparameters(plain, logger=False)

    def configure_model(self) -> None:
        if hasattr(self, "net"):
            return
        is_replaced = self.goes_on or self.initial_weights is not None
        # Not on a GPU, whose random numbers differ: one seed gives one model, on any device and by any strategy. What
        # a checkpoint replaces is not drawn at all.
        with torch.device("meta" if is_replaced else "cpu"):
            self.net = T6(self.config)
        if is_replaced:
            self.net.to_empty(device="cpu")
        if self.initial_weights is not None:
            self.net.load_state_dict(self.initial_weights)
        recompute.apply(self.net.blocks, self.recompute_choice)
        if self.compile_blocks:
            for block in self.net.blocks:
                block.compile()
        if self.device_mesh is not None:
            fsdp2.shard(self.net, self.device_mesh["data_parallel"])

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
        """Give every counted token of the step the same weight, and clip; or drop a step that is refused.

        Lightning's own clipping refuses fused optimizers under mixed precision, and the norm is wanted anyway.
        """
        assert self._sums is not None
        positions = self._positions * self.trainer.world_size
        self.step_sums, self._sums, self._positions = ranks.total(self._sums), None, 0
        # The gradients are those of Σ nats / positions; exactly 1 where every position counts.
        weight = positions / self.step_sums[1].clamp_min(1)
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = ranks.total_norm(gradients)
        self.grad_norm = norm * weight.to(norm.dtype)
        if self.accepts_step is not None and not self.accepts_step(self.step_loss, self.grad_norm):
            for parameter in self.parameters():
                parameter.grad = (
                    None  # the optimizer leaves what has no gradient alone, decay and moments too
                )
            return
        limit = gradient_clip_val or float("inf")
        factor = torch.clamp(limit / (self.grad_norm + 1e-6), max=1.0) * weight.to(norm.dtype)
        mine = [ranks.local(gradient) for gradient in gradients]
        torch._foreach_mul_(mine, factor)  # pyright: ignore[reportPrivateImportUsage]

    def weights_are_finite(self) -> bool:
        """Whether the norm of all weights is a finite number. Waits for the device; every rank must ask."""
        return bool(ranks.total_norm([p.detach() for p in self.parameters()]).isfinite())

    @property
    def step_loss(self) -> torch.Tensor:
        """Nats per counted token of the last optimizer step."""
        return self.step_sums[0] / self.step_sums[1].clamp_min(1)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        targets = batch["targets"]
        nats = self._summed_loss(batch)
        sums = torch.stack([nats.detach().double(), (targets != IGNORE).sum().double()])
        self._sums = sums if self._sums is None else self._sums + sums
        self._positions += targets.numel()
        # How many tokens the step counts is known after its last micro-batch only.
        return nats / targets.numel()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """One rank takes one batch in turn. A sharded model runs on all ranks or none: in the last round, ranks
        that have no batch left run one without counting it."""
        rank, world = self.trainer.global_rank, self.trainer.world_size
        turn = batch_idx % world
        is_last = batch_idx + 1 == self._validation_batches()
        if turn != rank and not (is_last and rank > turn):
            return
        losses = self._token_losses(batch)
        if turn == rank:
            self.metrics.update(losses, batch["targets"], batch["n_bytes"], batch["domain"])

    def _validation_batches(self) -> int:
        testing = self.trainer.testing
        return int((self.trainer.num_test_batches if testing else self.trainer.num_val_batches)[0])

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

    def _summed_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        documents = batch["documents"] if self.confine_to_documents else None
        return self.net.summed_loss(batch["tokens"], batch["targets"], documents)

    def _token_losses(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        documents = batch["documents"] if self.confine_to_documents else None
        return self.net.token_losses(batch["tokens"], batch["targets"], documents)
