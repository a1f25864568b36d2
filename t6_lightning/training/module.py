"""The LightningModule: steps, optimizer and schedule around a T6."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch

from t6_lightning.common.errors import BadInput, require
from t6_lightning.distributed import fsdp2, ranks
from t6_lightning.model.config import T6Config
from t6_lightning.model.t6 import IGNORE, T6
from t6_lightning.training import recompute
from t6_lightning.training.metrics import LanguageModelMetrics, log_at_step, logs_step
from t6_lightning.training.optim import AdamWConfig
from t6_lightning.training.recompute import Recompute
from t6_lightning.training.schedule import Cosine, FollowSchedule, Schedule

ONE_DOMAIN = ["text"]
"""The domains of data that names none."""

UNLOGGED = "unlogged_training_loss"
"""Key of a checkpoint: nats and tokens since the last logged step."""


@runtime_checkable
class StepJudge(Protocol):
    """A callback that may refuse an optimizer step, such as `SpikeGuard`."""

    def accepts_step(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> bool:
        """Whether the step may change the weights.

        Args:
            loss: nats per counted token of the step, over all micro-batches and ranks.
            grad_norm: norm of its gradient before clipping.
        """
        ...


class T6Module(pl.LightningModule):
    """Trains a T6 on batches of `tokens` and `targets`, integers (B, T); a target of -100 is not counted.

    Batches may also hold `documents` (B, T), the number of the document that each token belongs to; `n_bytes` (B,),
    the UTF-8 bytes that the targets stand for, from which bits per byte are computed; and `domain` (B,), an index into
    the `domains` of the data module. Those of `datamodules` hold all of them.

    Logs `train/loss`, `optim/lr` and `optim/grad_norm` of an optimizer step, and `val/*` or `test/*` (loss, perplexity,
    bits_per_byte, and bits per byte of each domain), through `self.log` to every logger of the Trainer. `train/loss`
    is the mean over the tokens since the step logged before. Metrics of the n-th optimizer step stand at step n.

    Args:
        net: the model, as a T6Config or as the plain mapping that checkpoints hold.
        optimizer: AdamW's settings.
        schedule: learning rate over the run; a cosine where nothing is said.
        confine_to_documents: attention stays inside each document of a packed window and positions restart
            there; off, as the paper trains, windows are read as one text.
        compile: compile one block and reuse it for all layers.
        summed_losses: n: an optimizer step's gradient is that of n times its mean loss, as in code that adds the mean
            losses of n micro-batches and never divides by n. Clipping then acts on n times the gradient. None: as
            many as the micro-batches of each rank.
        recompute: what the backward pass computes again instead of keeping: "none"; "selective", what is cheap;
            "full", each block but its input.
    """

    net: T6

    def __init__(
        self,
        net: T6Config,
        optimizer: AdamWConfig = AdamWConfig(),
        schedule: Schedule | None = None,
        confine_to_documents: bool = False,
        compile: bool = False,
        recompute: Recompute = "none",
        summed_losses: int | None = 1,
    ) -> None:
        super().__init__()
        self.config = T6Config.from_dict(dict(net)) if isinstance(net, Mapping) else net
        self.optimizer_config = optimizer
        self.lr = optimizer.lr
        """Peak learning rate; what Lightning's learning-rate finder sets."""
        self.schedule = schedule or Cosine()
        self.confine_to_documents = confine_to_documents
        self.compile_blocks = compile
        self.recompute_choice: Recompute = recompute
        fits = summed_losses is None or (type(summed_losses) is int and summed_losses >= 1)
        require(fits, "model.summed_losses", summed_losses, "it must be an integer >= 1 or null")
        self.summed_losses = summed_losses
        self.figures: dict[str, float] = {}
        """`val/*` or `test/*` of the last evaluation, in full precision."""
        self.grad_norm = torch.tensor(float("nan"))
        """Of the last optimizer step, before clipping; of `summed_losses` times the mean loss."""
        self.step_sums = torch.zeros(2, dtype=torch.float64)
        """Nats and counted tokens of the last optimizer step, over all its micro-batches and ranks."""
        self._first_weights: Mapping[str, torch.Tensor] | None = None
        self._unlogged = torch.zeros(2, dtype=torch.float64)
        self._sums: torch.Tensor | None = None
        self._divisor = 0
        self._rate = 0.0
        self._has_stepped = False
        # Plain types only: checkpoints are read without unpickling code.
        plain = {"net": self.config.architecture(), "confine_to_documents": confine_to_documents}
        self.save_hyperparameters(plain, logger=False)

    # --- what is trained, on what ---

    def start_from(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Let `configure_model` give the model these weights instead of random ones.

        Args:
            weights: state dict of a T6 of this architecture.
        """
        self._first_weights = weights

    def configure_model(self) -> None:
        if hasattr(self, "net"):
            return
        resumes = self._trainer is not None and self._trainer.ckpt_path is not None
        is_replaced = resumes or self._first_weights is not None
        # Not on a GPU, whose random numbers differ: one seed gives one model, on any device and by any strategy. What
        # a checkpoint replaces is not drawn at all: at size that takes seconds.
        with torch.device("meta" if is_replaced else "cpu"):
            self.net = T6(self.config)
        if is_replaced:
            self.net.to_empty(device="cpu")
        if self._first_weights is not None:
            self.net.load_state_dict(self._first_weights)
            self._first_weights = None
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
        data = self._data
        if hasattr(data, "tokenizer"):
            self.check_tokenizer(data)

    @property
    def _data(self) -> Any:
        """The data module, or None."""
        return getattr(self.trainer, "datamodule", None)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if hasattr(self._data, "tokenizer"):
            checkpoint["tokenizer"] = self._data.tokenizer.to_json()
        checkpoint["precision"] = str(self.trainer.precision)
        checkpoint[UNLOGGED] = self._unlogged.cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        of_monitor = checkpoint.get("callbacks", {}).get("Monitor", {})
        sums = checkpoint.get(UNLOGGED, of_monitor.get("sums"))  # version 0.1.0 kept them with Monitor
        if sums is not None:
            self._unlogged = sums.clone()

    # --- optimizer steps ---

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_config.build(self)
        scheduler = FollowSchedule(
            optimizer, self.schedule, lambda: self.lr, lambda: self.trainer.global_step, self._total_steps
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _total_steps(self) -> float | None:
        """Optimizer steps of the whole run; None until the training data is there that tells how long an epoch is."""
        # Asking earlier would make Lightning set the data up before a checkpoint's position is known.
        if self.trainer.max_epochs != -1 and self.trainer.train_dataloader is None:
            return None
        return self.trainer.estimated_stepping_batches

    def on_train_start(self) -> None:
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, FollowSchedule):
                config.scheduler.refresh()
        self._unlogged = self._unlogged.to(self.device)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        targets = batch["targets"]
        nats = self._summed_loss(batch)
        sums = torch.stack([nats.detach().double(), (targets != IGNORE).sum().double()])
        self._sums = sums if self._sums is None else self._sums + sums
        # How many tokens the step counts is known after its last micro-batch only. Until then every micro-batch is
        # divided by the same number, that of the first one's positions.
        self._divisor = self._divisor or targets.numel()
        return nats / self._divisor

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
        # What the sum of nats was divided by so far: here, by Lightning over micro-batches, and over ranks.
        divided_by = self._divisor * self.trainer.accumulate_grad_batches * self.trainer.world_size
        self.step_sums, self._sums = ranks.total(self._sums), None
        summed = self.summed_losses or self.trainer.accumulate_grad_batches
        # Exactly `summed` where every position counts and the step has all its micro-batches.
        weight = divided_by * summed / self.step_sums[1].clamp_min(1)
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = ranks.total_norm(gradients)
        self.grad_norm = norm * weight.to(norm.dtype)
        self._rate = optimizer.param_groups[0]["lr"]
        self._has_stepped = True
        verdicts = [judge.accepts_step(self.step_loss, self.grad_norm) for judge in self._judges()]
        if not all(verdicts):
            for parameter in self.parameters():
                # The optimizer leaves what has no gradient alone, decay and moments too.
                parameter.grad = None
            return
        self._unlogged = self._unlogged + self.step_sums
        limit = gradient_clip_val or float("inf")
        factor = torch.clamp(limit / (self.grad_norm + 1e-6), max=1.0) * weight.to(norm.dtype)
        mine = [ranks.local(gradient) for gradient in gradients]
        torch._foreach_mul_(mine, factor)  # pyright: ignore[reportPrivateImportUsage]

    def _judges(self) -> list[StepJudge]:
        callbacks: list[Any] = self.trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        return [callback for callback in callbacks if isinstance(callback, StepJudge)]

    def weights_are_finite(self) -> bool:
        """Whether the norm of all weights is a finite number. Waits for the device; every rank must ask."""
        return bool(ranks.total_norm([p.detach() for p in self.parameters()]).isfinite())

    @property
    def step_loss(self) -> torch.Tensor:
        """Nats per counted token of the last optimizer step."""
        return self.step_sums[0] / self.step_sums[1].clamp_min(1)

    def configure_callbacks(self) -> list[pl.Callback]:
        callbacks: list[Any] = self.trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        return [] if any(isinstance(callback, _StepLog) for callback in callbacks) else [_StepLog()]

    def log_step(self) -> None:
        """Log the optimizer step just taken, if one was, where it is due."""
        if not self._has_stepped:
            return
        self._has_stepped = False
        writes = logs_step(self.trainer)
        if not (writes or self.trainer.global_step == 1):  # the first is for callbacks; loggers do not get it
            log_at_step(self, {})  # ModelCheckpoint names files by it
            return
        nats, counted = self._unlogged
        log_at_step(
            self,
            {
                "train/loss": nats / counted,  # nan: every step was refused
                "optim/lr": self._rate,
                "optim/grad_norm": self.grad_norm,
            },
        )
        if writes:
            self._unlogged = torch.zeros_like(self._unlogged)

    # --- evaluation ---

    def on_validation_epoch_start(self) -> None:
        domains = getattr(self._data, "domains", None)
        self._counts_domains = domains is not None
        self.metrics = LanguageModelMetrics(domains or ONE_DOMAIN).to(self.device)

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        targets = batch["targets"]
        one = torch.zeros(len(targets), dtype=torch.int64, device=targets.device)
        domain = batch.get("domain", one) if self._counts_domains else one
        self.metrics.update(self._token_losses(batch), targets, batch.get("n_bytes", one), domain)

    def on_validation_epoch_end(self) -> None:
        name = "test" if self.trainer.testing else "val"
        self.figures = {f"{name}/{metric}": value for metric, value in self.metrics.compute().items()}
        self.metrics.reset()
        log_at_step(self, self.figures)

    def test_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> dict[str, torch.Tensor]:
        """Negative log-likelihood in nats of every token of the window (B, T), its target, and its domain if known."""
        known = {name: batch[name] for name in ("targets", "domain") if name in batch}
        return {"nll": self._token_losses(batch)} | known

    def _documents(self, batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
        if self.confine_to_documents and "documents" not in batch:
            raise BadInput("confine_to_documents=True is not possible: the batches hold no `documents`")
        return batch["documents"] if self.confine_to_documents else None

    def _summed_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.net.summed_loss(batch["tokens"], batch["targets"], self._documents(batch))

    def _token_losses(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.net.token_losses(batch["tokens"], batch["targets"], self._documents(batch))


class _StepLog(pl.Callback):
    """Logs steps after other callbacks have seen them, and before a checkpoint is taken.

    Lightning calls the module itself after all callbacks; a checkpoint would then hold a loss that is logged already.
    """

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, T6Module)
        pl_module.log_step()
