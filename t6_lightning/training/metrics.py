"""Language-model metrics with torchmetrics: exact sums over everything, across batches and ranks; and their logging."""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, log

import lightning.pytorch as pl
import torch
from torchmetrics import Metric

from t6_lightning.model.t6 import IGNORE


class LanguageModelMetrics(Metric):
    """Loss, perplexity and bits per byte, over all text and in each domain.

    Bits per byte = Σ negative log-likelihood / ln 2 / Σ UTF-8 bytes: it does not depend on the tokenizer.

    Args:
        domains: names of the domains that rows point to.
    """

    full_state_update = False

    def __init__(self, domains: list[str]) -> None:
        super().__init__()
        self.domains = domains
        for name in ("nll", "tokens", "bytes"):
            self.add_state(name, torch.zeros(len(domains), dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        losses_BT: torch.Tensor,
        targets_BT: torch.Tensor,
        n_bytes_B: torch.Tensor,
        domain_B: torch.Tensor,
    ) -> None:
        """Add one batch: token losses in nats, targets (-100 is ignored), target bytes and domain of each row."""
        index = domain_B.clamp_min(0)
        for state, value in (
            (self.nll, losses_BT.double().sum(1)),
            (self.tokens, (targets_BT != IGNORE).sum(1).double()),
            (self.bytes, n_bytes_B.double()),
        ):
            assert isinstance(state, torch.Tensor)
            state.index_add_(0, index, value)

    def compute(self) -> dict[str, float]:
        """`loss` (nats per token), `perplexity`, `bits_per_byte` and, of several domains, `<domain>/bits_per_byte`.

        Bits per byte are left out where the bytes are not known, and domains without tokens.
        """
        rows = self.per_domain()
        names = ("loss", "perplexity", "bits_per_byte") if rows["all"]["bytes"] else ("loss", "perplexity")
        figures = {name: rows["all"][name] for name in names}
        if len(self.domains) > 1:
            counted = [name for name in self.domains if rows[name]["bytes"]]
            figures |= {f"{name}/bits_per_byte": rows[name]["bits_per_byte"] for name in counted}
        return figures

    def per_domain(self) -> dict[str, dict[str, float]]:
        """Each domain's tokens, bytes, loss, perplexity and bits per byte, and those of "all"."""
        sums = [torch.as_tensor(state).tolist() for state in (self.nll, self.tokens, self.bytes)]
        rows = {name: summarize(*values) for name, *values in zip(self.domains, *sums, strict=True)}
        return rows | {"all": summarize(*(sum(values) for values in sums))}


def summarize(nll: float, tokens: float, n_bytes: float) -> dict[str, float]:
    """Loss, perplexity and bits per byte from sums of nats, tokens and UTF-8 bytes, which are kept too."""
    loss = nll / tokens if tokens else float("nan")
    return {
        "tokens": tokens,
        "bytes": n_bytes,
        "loss": loss,
        "perplexity": exp(loss) if loss < 700 else float("inf"),
        "bits_per_byte": nll / log(2) / n_bytes if n_bytes else float("nan"),
    }


def logs_step(trainer: pl.Trainer) -> bool:
    """Whether Lightning hands the metrics of the optimizer step just taken to the loggers.

    That is every `log_every_n_steps`, and after a step at which the run was told to stop.
    """
    return bool(trainer.fast_dev_run or trainer._logger_connector.should_update_logs)  # pyright: ignore[reportAttributeAccessIssue]


def log_at_step(module: pl.LightningModule, metrics: Mapping[str, torch.Tensor | float]) -> None:
    """Log metrics of the optimizer step just taken through `self.log`, in full precision.

    For every logger of the Trainer and for callbacks that watch a metric. Lightning's own step counts from 0; a metric
    named `step` says another, which loggers take in its place: the n-th optimizer step is n.
    """
    trainer = module.trainer
    named = ({"step": trainer.global_step} if trainer.state.fn == "fit" else {}) | dict(metrics)
    module.log_dict({name: torch.as_tensor(value, dtype=torch.float64) for name, value in named.items()})
